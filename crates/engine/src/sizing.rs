//! How a byte budget becomes pages, and how long a sequence may be.

use std::fmt;

use ctxserve_backend::{KvDtype, KvPlan, KvSpec, PageId};

use crate::{EngineConfig, EngineError};

/// Sequences and tokens of each that the default budget makes room for.
const DEFAULT_ROOM: (usize, usize) = (16, 4096);

/// What of the budget beyond one sequence's needs may go to windows that are kept for later prompts: one part in so many.
const KEPT_SHARE: usize = 8;

/// Tokens of full attention for which one window at most is kept.
const KEPT_EVERY: usize = 1024;

/// Kept windows that the default budget makes room for.
const DEFAULT_KEPT: usize = 32;

/// The shortest useful sequence: one prompt token and one answer token.
const SHORTEST: usize = 2;

/// The pools and the limits that follow from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sizing {
    pub(crate) plan: KvPlan,
    pub(crate) max_model_len: usize,
}

/// Pages of a group that one sequence of `len` tokens needs when alone, prefilled in chunks of `chunk`.
fn alone(spec: &KvSpec, group: usize, len: usize, chunk: usize) -> usize {
    spec.pages_for(group, len, chunk.min(len))
}

/// Bytes that one sequence of `len` tokens needs when alone.
fn bytes_alone(spec: &KvSpec, len: usize, chunk: usize) -> usize {
    let group = |g| alone(spec, g, len, chunk).saturating_mul(spec.page_bytes(g));
    (0..spec.groups.len()).map(group).fold(0, usize::saturating_add)
}

/// The largest number up to `most` that fits, where every smaller one fits too; 0 where none does.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, most.saturating_add(1));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

/// Divides the budget: windowed groups get what `max_num_seqs` sequences can hold at once, full groups the rest,
/// up to `max_num_seqs` sequences of full length. With prefix caching an eighth of what is left beside one sequence goes to
/// windows that are kept for later prompts. Where the budget is tight windowed groups get less, and the
/// scheduler runs fewer sequences at a time; one sequence of `max_model_len` always fits.
///
/// # Errors
/// Limits that contradict each other or the model, and a budget that cannot hold one sequence.
pub(crate) fn size(spec: &KvSpec, max_context: usize, config: &EngineConfig) -> Result<Sizing, EngineError> {
    validate(spec, max_context, config)?;
    let chunk = config.max_batched_tokens;
    let asked = config.max_model_len.unwrap_or(max_context);
    let budget = config.kv_bytes.unwrap_or_else(|| {
        let room = DEFAULT_ROOM.0.min(config.max_num_seqs);
        let short = bytes_alone(spec, DEFAULT_ROOM.1.min(asked), chunk).saturating_mul(room);
        let kept = if config.prefix_caching { DEFAULT_KEPT } else { 0 };
        let kept = kept_bytes(spec).saturating_mul(KEPT_SHARE).saturating_mul(kept);
        short.max(bytes_alone(spec, asked, chunk)).saturating_add(kept)
    });
    let fits = largest(asked, |len| bytes_alone(spec, len, chunk) <= budget);
    if fits < config.max_model_len.unwrap_or(SHORTEST) {
        let max_model_len = config.max_model_len.unwrap_or(SHORTEST);
        let needed = bytes_alone(spec, max_model_len, chunk);
        return Err(EngineError::KvTooSmall { budget, needed, max_model_len, fits });
    }
    let max_model_len = fits;

    let groups = 0..spec.groups.len();
    let is_full = |g: &usize| spec.groups[*g].window.is_none();
    let windowed_pages = |g: usize, seqs: usize| {
        let others = spec.pages_for(g, max_model_len, 1).saturating_mul(seqs.saturating_sub(1));
        alone(spec, g, max_model_len, chunk).saturating_add(others)
    };
    let bytes = |g: usize, pages: usize| pages.saturating_mul(spec.page_bytes(g));
    let windowed_bytes = |seqs: usize| -> usize {
        let windowed = groups.clone().filter(|g| !is_full(g));
        windowed.map(|g| bytes(g, windowed_pages(g, seqs))).fold(0, usize::saturating_add)
    };
    let full_page: usize =
        groups.clone().filter(is_full).map(|g| spec.page_bytes(g)).fold(0, usize::saturating_add);
    let full_alone = alone_full(spec, max_model_len);
    let for_windows = budget.saturating_sub(full_alone.saturating_mul(full_page));
    let seqs = largest(config.max_num_seqs, |seqs| windowed_bytes(seqs) <= for_windows).max(1);
    let left = budget.saturating_sub(windowed_bytes(seqs));
    let most = full_alone.saturating_mul(config.max_num_seqs).min(PageId::MAX as usize);
    let kept = if config.prefix_caching && full_page > 0 {
        let spare = left.saturating_sub(full_alone.saturating_mul(full_page));
        let tokens = (left / full_page).min(most).saturating_mul(spec.page_size);
        (spare / KEPT_SHARE).checked_div(kept_bytes(spec)).unwrap_or(0).min(tokens / KEPT_EVERY)
    } else {
        0
    };
    let left = left.saturating_sub(kept.saturating_mul(kept_bytes(spec)));
    let full_pages = left.checked_div(full_page).unwrap_or(0).clamp(full_alone, most.max(full_alone));
    let windows = |g| windowed_pages(g, seqs).saturating_add(kept.saturating_mul(kept_pages(spec, g)));
    let pages = groups.map(|g| if is_full(&g) { full_pages } else { windows(g) }).collect();
    Ok(Sizing { plan: KvPlan { spec: spec.clone(), pages }, max_model_len })
}

/// Pages of a windowed group that are kept at one point: those seen from there, and from the page before.
fn kept_pages(spec: &KvSpec, group: usize) -> usize {
    spec.groups[group].window.map_or(0, |window| window.div_ceil(spec.page_size).saturating_add(1))
}

/// Bytes that are kept at one point.
fn kept_bytes(spec: &KvSpec) -> usize {
    let group = |g| kept_pages(spec, g).saturating_mul(spec.page_bytes(g));
    (0..spec.groups.len()).map(group).fold(0, usize::saturating_add)
}

fn alone_full(spec: &KvSpec, len: usize) -> usize {
    len.div_ceil(spec.page_size)
}

fn validate(spec: &KvSpec, max_context: usize, config: &EngineConfig) -> Result<(), EngineError> {
    let at_least = |field, value: usize, low: usize| {
        let message = format!("must be at least {low}, got {value}");
        if value < low { Err(EngineError::Config { field, message }) } else { Ok(()) }
    };
    at_least("max_num_seqs", config.max_num_seqs, 1)?;
    at_least("max_batched_tokens", config.max_batched_tokens, 1)?;
    at_least("the model's context", max_context, SHORTEST)?;
    at_least("the model's KV page size", spec.page_size, 1)?;
    at_least("the number of the model's KV groups", spec.groups.len(), 1)?;
    for window in spec.groups.iter().filter_map(|group| group.window) {
        at_least("the model's attention window", window, 1)?;
    }
    match config.max_model_len {
        Some(asked) if asked > max_context => Err(EngineError::ContextTooLong { asked, max: max_context }),
        Some(asked) => at_least("max_model_len", asked, SHORTEST),
        None => Ok(()),
    }
}

/// One group's share of the KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupReport {
    /// Keys seen by a query; `None` is full attention.
    pub window: Option<usize>,
    /// Layers in the group.
    pub layers: usize,
    /// Pages of its pool.
    pub pages: usize,
    /// Bytes of its pool.
    pub bytes: usize,
    /// Storage of its keys and values.
    pub dtype: KvDtype,
}

/// The KV cache as planned, for logs and metrics. Weights are not counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvReport {
    /// The groups, in the model's order.
    pub groups: Vec<GroupReport>,
    /// Positions per page.
    pub page_size: usize,
    /// Bytes of all pools.
    pub bytes: usize,
    /// Tokens that fit, over all sequences, by the full-attention groups; `None` where every group has a window.
    pub tokens: Option<usize>,
    /// Longest sequence, tokens.
    pub max_model_len: usize,
    /// Sequences of `max_model_len` that fit at once.
    pub longest_sequences: usize,
    /// Most sequences that run at once.
    pub max_num_seqs: usize,
}

impl KvReport {
    pub(crate) fn new(sizing: &Sizing, max_num_seqs: usize) -> Self {
        let (plan, spec, len) = (&sizing.plan, &sizing.plan.spec, sizing.max_model_len);
        let group = |(g, &pages): (usize, &usize)| GroupReport {
            window: spec.groups[g].window,
            layers: spec.groups[g].layers.len(),
            pages,
            bytes: pages.saturating_mul(spec.page_bytes(g)),
            dtype: spec.groups[g].dtype,
        };
        let groups: Vec<_> = plan.pages.iter().enumerate().map(group).collect();
        let full = groups.iter().find(|group| group.window.is_none());
        let held = |(g, &pages): (usize, &usize)| pages / spec.pages_for(g, len, 1).max(1);
        let longest_sequences = plan.pages.iter().enumerate().map(held).min().unwrap_or(0).min(max_num_seqs);
        Self {
            page_size: spec.page_size,
            bytes: groups.iter().map(|group| group.bytes).fold(0, usize::saturating_add),
            tokens: full.map(|group| group.pages.saturating_mul(spec.page_size)),
            max_model_len: len,
            longest_sequences,
            max_num_seqs,
            groups,
        }
    }
}

impl fmt::Display for KvReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "KV cache {}, pages of {} tokens", Bytes(self.bytes), self.page_size)?;
        for group in &self.groups {
            match group.window {
                Some(window) => write!(f, "  window of {window}")?,
                None => write!(f, "  full attention")?,
            }
            let dtype = match group.dtype {
                KvDtype::F32 => "float32",
                KvDtype::Bf16 => "bfloat16",
                KvDtype::Fp8E4m3 => "fp8 e4m3",
            };
            let (layers, pages, bytes) = (group.layers, group.pages, Bytes(group.bytes));
            writeln!(f, ", {layers} layers in {dtype}: {pages} pages, {bytes}")?;
        }
        if let Some(tokens) = self.tokens {
            write!(f, "  room for {tokens} tokens; ")?;
        } else {
            write!(f, "  ")?;
        }
        let (longest, len) = (self.longest_sequences, self.max_model_len);
        write!(f, "{longest} sequences of {len} tokens at once, {} shorter ones", self.max_num_seqs)
    }
}

/// A number of bytes that prints in binary units.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub usize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match units.iter().find(|(_, shift)| self.0 >> shift > 0) {
            Some((unit, shift)) => write!(f, "{:.1} {unit}", self.0 as f64 / f64::from(1_u32 << shift)),
            None => write!(f, "{} B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use ctxserve_backend::KvGroup;

    use super::*;

    /// gpt-oss-20b: 12 layers with a window of 128, 12 with full attention.
    fn spec() -> KvSpec {
        let groups = vec![
            KvGroup { window: Some(128), layers: (0..24).step_by(2).collect(), dtype: KvDtype::Bf16 },
            KvGroup { window: None, layers: (1..24).step_by(2).collect(), dtype: KvDtype::Bf16 },
        ];
        KvSpec { page_size: 16, kv_heads: 8, head_dim: 64, groups }
    }

    fn config(kv_bytes: Option<usize>, max_model_len: Option<usize>) -> EngineConfig {
        EngineConfig {
            max_num_seqs: 32,
            max_batched_tokens: 512,
            max_model_len,
            kv_bytes,
            ..Default::default()
        }
    }

    /// What the sizing promises, whatever the numbers.
    fn promises(sizing: &Sizing, config: &EngineConfig) {
        let (plan, len) = (&sizing.plan, sizing.max_model_len);
        if let Some(budget) = config.kv_bytes {
            assert!(plan.bytes() <= budget, "{} over {budget}", plan.bytes());
        }
        for (group, &pages) in plan.pages.iter().enumerate() {
            assert!(pages >= alone(&plan.spec, group, len, config.max_batched_tokens));
        }
    }

    /// OPS-07: windowed layers hold the window of each sequence, and what is kept for later prompts.
    #[test]
    fn windowed_layers_cost_the_window() {
        // 8k times 32 sequences: 12 GiB where windowed layers are paged at full length, about half of it here.
        for (prefix_caching, share) in [(false, 40), (true, 5)] {
            let config = EngineConfig { prefix_caching, ..config(Some(usize::MAX), Some(8192)) };
            let sizing = size(&spec(), 131_072, &config).unwrap();
            promises(&sizing, &config);
            let full = 32 * 8192 * 12 * 2 * 8 * 64 * 2;
            let windowed = sizing.plan.pages[0] * spec().page_bytes(0);
            assert_eq!(sizing.plan.pages[1] * spec().page_bytes(1), full);
            assert!(windowed < full / share, "{windowed} of {full}");
        }
    }

    /// A budget with room to spare keeps a window for every few thousand tokens; one that just fits keeps none.
    #[test]
    fn kept_windows_take_a_bounded_share() {
        let pages = |kv_bytes, prefix_caching| {
            let config = EngineConfig { prefix_caching, ..config(Some(kv_bytes), Some(32_768)) };
            let sizing = size(&spec(), 131_072, &config).unwrap();
            promises(&sizing, &config);
            sizing.plan.pages
        };
        let (with, without) = (pages(8 << 30, true), pages(8 << 30, false));
        let bytes = (with[0] - without[0]) * spec().page_bytes(0);
        assert!((400 << 20..1 << 30).contains(&bytes), "{bytes}");
        assert!(with[1] < without[1] && with[1] > without[1] * 7 / 8);
        let least = bytes_alone(&spec(), 32_768, 512);
        assert_eq!(pages(least, true), pages(least, false));
    }

    #[test]
    fn without_a_length_the_budget_decides() {
        let gib = 1 << 30;
        let short = size(&spec(), 131_072, &config(Some(gib), None)).unwrap();
        promises(&short, &config(Some(gib), None));
        assert!((30_000..131_072).contains(&short.max_model_len), "{}", short.max_model_len);
        let next = size(&spec(), 131_072, &config(Some(gib), Some(short.max_model_len + 1)));
        let error = next.unwrap_err();
        assert!(
            matches!(error, EngineError::KvTooSmall { fits, needed, .. } if fits == short.max_model_len && needed > gib),
            "{error}"
        );
        let whole = size(&spec(), 131_072, &config(Some(8 * gib), None)).unwrap();
        assert_eq!(whole.max_model_len, 131_072);
    }

    #[test]
    fn the_default_budget_holds_the_longest_sequence_and_some_short_ones() {
        for max_model_len in [None, Some(2), Some(100), Some(4096), Some(131_072)] {
            let config = config(None, max_model_len);
            let sizing = size(&spec(), 131_072, &config).unwrap();
            promises(&sizing, &config);
            assert_eq!(sizing.max_model_len, max_model_len.unwrap_or(131_072));
        }
    }

    #[test]
    fn a_model_without_full_attention_needs_no_more_than_its_windows() {
        let mut spec = spec();
        spec.groups.pop();
        let sizing = size(&spec, 131_072, &config(Some(1 << 30), None)).unwrap();
        assert_eq!(sizing.max_model_len, 131_072);
        assert!(sizing.plan.bytes() < 1 << 30);
        assert_eq!(KvReport::new(&sizing, 32).tokens, None);
    }

    #[test]
    fn senseless_limits_are_named() {
        let base = || config(None, None);
        let cases = [
            ("max_num_seqs", EngineConfig { max_num_seqs: 0, ..base() }),
            ("max_batched_tokens", EngineConfig { max_batched_tokens: 0, ..base() }),
            ("max_model_len", config(None, Some(1))),
        ];
        for (name, config) in cases {
            let error = size(&spec(), 4096, &config).unwrap_err();
            assert!(matches!(error, EngineError::Config { field, .. } if field == name), "{error}");
        }
        let error = size(&spec(), 4096, &config(None, Some(4097))).unwrap_err();
        assert_eq!(error, EngineError::ContextTooLong { asked: 4097, max: 4096 });
        let huge = EngineConfig { max_batched_tokens: usize::MAX / 4, max_num_seqs: 7, ..base() };
        promises(&size(&spec(), 4096, &huge).unwrap(), &huge);
    }

    /// OPS-05.
    #[test]
    fn the_report_reads_well() {
        let mut spec = spec();
        spec.groups[1].dtype = KvDtype::Fp8E4m3;
        let sizing = size(&spec, 131_072, &config(Some(4 << 30), Some(32_768))).unwrap();
        let report = KvReport::new(&sizing, 32).to_string();
        let lines: Vec<_> = report.lines().collect();
        assert!(lines[0].starts_with("KV cache 4.0 GiB, pages of 16 tokens"), "{report}");
        assert!(lines[1].starts_with("  window of 128, 12 layers in bfloat16: "), "{report}");
        assert!(lines[2].starts_with("  full attention, 12 layers in fp8 e4m3: "), "{report}");
        assert!(lines[3].contains("sequences of 32768 tokens at once"), "{report}");
    }
}
