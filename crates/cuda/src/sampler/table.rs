//! What a sampling row looks like to the kernels.

use std::collections::HashMap;
use std::sync::Arc;

use ctxserve_backend::SampleRow;
use ctxserve_core::{TokenId, TokenMask};

use crate::ops::sample_pick::ALTERNATIVES;
use crate::ops::sample_scan::{ADJUSTED, BANNED, DRAWN, LOGPROBS, Line, MASKED, PART, SEEN};

/// Words of a mask in a part.
const MASK_WORDS: usize = PART / 32;

/// The line of a row whose lists start at `lists` and whose mask at `mask`, if it has any.
pub(super) fn line(row: &SampleRow, lists: Option<u32>, mask: Option<u32>) -> Line {
    let params = &*row.params;
    let mut line = Line {
        top_p: 1.0,
        repetition: params.repetition_penalty,
        frequency: params.frequency_penalty,
        presence: params.presence_penalty,
        lists: lists.unwrap_or(0),
        mask: mask.unwrap_or(0),
        ..Line::default()
    };
    if lists.is_some() {
        line.flags |= ADJUSTED;
    }
    if mask.is_some() {
        line.flags |= MASKED;
    }
    if let Some(wanted) = params.logprobs {
        line.flags |= LOGPROBS;
        line.alternatives = wanted.min(ALTERNATIVES) as u32;
    }
    if !params.is_greedy() {
        let inverse = 1.0 / f64::from(params.temperature);
        line.flags |= DRAWN;
        line.uniform = uniform(row.seed, row.step);
        line.top_p = f64::from(params.top_p.min(1.0));
        line.min_p = params.min_p;
        line.top_k = params.top_k;
        line.inverse = (inverse as f32).min(f32::MAX);
        // Beyond that nothing but the best weighs anything, and products with the rest could overflow.
        if inverse < 1e30 {
            line.inverse_rest = (inverse - f64::from(line.inverse)) as f32;
        }
    }
    line
}

/// Draw number `step` of stream `seed`, as the CPU defines it: SplitMix64's output function over a counter whose origin is the mixed
/// seed, 53 bits.
fn uniform(seed: u64, step: u64) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let counter = step.wrapping_add(1).wrapping_mul(GOLDEN);
    let bits = mix(mix(seed.wrapping_add(GOLDEN)).wrapping_add(counter));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// One logit to change: by a bias, by penalties, or to minus infinity.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    id: TokenId,
    bias: f32,
    marks: u32,
}

/// Steps for which the ids of a prompt are kept unused.
const KEPT: u64 = 64;

/// The distinct ids of a prompt under a repetition penalty: found once, not in every step.
#[derive(Debug)]
struct Prompt {
    /// Held so that its address stays its own.
    _tokens: Arc<[TokenId]>,
    ids: Vec<TokenId>,
    used: u64,
}

/// The adjustments of a step's rows: each id of a row once, sorted by part.
#[derive(Debug)]
pub(super) struct Lists {
    /// By address and length.
    prompts: HashMap<(usize, usize), Prompt>,
    step: u64,
    /// Of each id, the row (as counted by `row`) that entered it last, and where in `entries` it is.
    places: Vec<(u32, u32)>,
    row: u32,
    entries: Vec<Entry>,
    /// Entries before each part.
    offsets: Vec<u32>,
    words: Vec<u32>,
}

impl Lists {
    pub(super) fn new(vocab: usize) -> Self {
        Self {
            prompts: HashMap::new(),
            step: 0,
            places: vec![(0, 0); vocab],
            row: 0,
            entries: Vec::new(),
            offsets: vec![0; vocab.div_ceil(PART) + 1],
            words: Vec::new(),
        }
    }

    /// Starts a step.
    pub(super) fn clear(&mut self) {
        self.words.clear();
        self.step += 1;
        let oldest = self.step.saturating_sub(KEPT);
        self.prompts.retain(|_, prompt| prompt.used >= oldest);
    }

    /// All lists of the step.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Appends the lists of a row and returns where they start; `None` if it changes no logit.
    pub(super) fn add(&mut self, row: &SampleRow) -> Option<u32> {
        let params = &*row.params;
        if row.banned.is_empty() && params.logit_bias.is_empty() && !params.has_penalties() {
            return None;
        }
        self.row = self.row.checked_add(1).unwrap_or_else(|| {
            self.places.fill((0, 0));
            1
        });
        self.entries.clear();
        for &(id, bias) in &params.logit_bias {
            self.enter(id, |entry| entry.bias += bias);
        }
        if params.repetition_penalty != 1.0 {
            self.enter_prompt(&row.prompt);
            for &id in row.generated.iter() {
                self.enter(id, |entry| entry.marks |= SEEN);
            }
        }
        if params.has_penalties() {
            for &id in row.generated.iter() {
                self.enter(id, |entry| entry.marks += 1);
            }
        }
        for &id in row.banned.iter() {
            self.enter(id, |entry| entry.marks |= BANNED);
        }
        if self.entries.is_empty() { None } else { Some(self.pack()) }
    }

    /// Appends the mask of a row, if it has one, and returns where it starts: whole parts, nothing allowed beyond the mask.
    pub(super) fn add_mask(&mut self, row: &SampleRow) -> Option<u32> {
        let mask: &TokenMask = row.mask.as_deref()?;
        let (start, parts) = (self.words.len(), self.offsets.len() - 1);
        let len = parts * MASK_WORDS;
        self.words.extend(mask.words().iter().take(len));
        self.words.resize(start + len, 0);
        Some(start as u32)
    }

    fn enter_prompt(&mut self, tokens: &Arc<[TokenId]>) {
        let place = (tokens.as_ptr() as usize, tokens.len());
        let mut prompt = self.prompts.remove(&place).unwrap_or_else(|| {
            let mut ids = tokens.to_vec();
            ids.sort_unstable();
            ids.dedup();
            Prompt { _tokens: Arc::clone(tokens), ids, used: 0 }
        });
        for &id in &prompt.ids {
            self.enter(id, |entry| entry.marks |= SEEN);
        }
        prompt.used = self.step;
        self.prompts.insert(place, prompt);
    }

    fn enter(&mut self, id: TokenId, change: impl FnOnce(&mut Entry)) {
        // Ids beyond the vocabulary have no logit.
        let Some(place) = self.places.get_mut(id as usize) else { return };
        if place.0 != self.row {
            *place = (self.row, self.entries.len() as u32);
            self.entries.push(Entry { id, bias: 0.0, marks: 0 });
        }
        if let Some(entry) = self.entries.get_mut(place.1 as usize) {
            change(entry);
        }
    }

    /// Offsets, then entries, counting-sorted by part.
    fn pack(&mut self) -> u32 {
        let start = self.words.len();
        self.offsets.fill(0);
        for entry in &self.entries {
            self.offsets[entry.id as usize / PART + 1] += 1;
        }
        let mut sum = 0;
        for offset in &mut self.offsets {
            sum += *offset;
            *offset = sum;
        }
        self.words.extend_from_slice(&self.offsets);
        let base = self.words.len();
        self.words.resize(base + 3 * self.entries.len(), 0);
        for entry in &self.entries {
            let next = &mut self.offsets[entry.id as usize / PART];
            let at = base + 3 * *next as usize;
            self.words[at..at + 3].copy_from_slice(&[entry.id, entry.bias.to_bits(), entry.marks]);
            *next += 1;
        }
        start as u32
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ctxserve_core::SamplingParams;

    use super::*;

    fn entries(lists: &Lists, start: usize, parts: usize) -> Vec<(u32, Entry)> {
        let words = &lists.words()[start..];
        (0..parts as u32)
            .flat_map(|part| (words[part as usize]..words[part as usize + 1]).map(move |at| (part, at)))
            .map(|(part, at)| {
                let at = parts + 1 + 3 * at as usize;
                let entry =
                    Entry { id: words[at], bias: f32::from_bits(words[at + 1]), marks: words[at + 2] };
                (part, entry)
            })
            .collect()
    }

    #[test]
    fn an_id_is_entered_once_with_all_that_is_said_of_it() {
        let mut lists = Lists::new(3000);
        let mut row = SampleRow::new(Arc::new(SamplingParams {
            logit_bias: vec![(2999, 2.0), (5, 1.0), (3000, 9.0)],
            repetition_penalty: 1.5,
            frequency_penalty: 0.5,
            ..SamplingParams::default()
        }));
        row.prompt = Arc::from([5, 7, 7, 1024]);
        row.generated = Arc::new(vec![1024, 9, 1024]);
        row.banned = Arc::from([7, u32::MAX]);
        assert_eq!(lists.add(&row), Some(0));
        let start = lists.words().len();
        assert_eq!(lists.add(&row), Some(start as u32));
        let entry = |id, bias, marks| Entry { id, bias, marks };
        let want = vec![
            (0, entry(5, 1.0, SEEN)),
            (0, entry(7, 0.0, SEEN | BANNED)),
            (0, entry(9, 0.0, SEEN | 1)),
            (1, entry(1024, 0.0, SEEN | 2)),
            (2, entry(2999, 2.0, 0)),
        ];
        for start in [0, start] {
            assert_eq!(entries(&lists, start, 3), want);
        }
        lists.clear();
        assert!(lists.words().is_empty());
        // Another prompt, the same again, and none of it kept for ever.
        row.prompt = Arc::from([8]);
        for _ in 0..2 {
            let start = lists.add(&row).unwrap() as usize;
            let ids: Vec<u32> = entries(&lists, start, 3).iter().map(|(_, entry)| entry.id).collect();
            assert_eq!(ids, [5, 8, 9, 7, 1024, 2999]);
        }
        assert_eq!(lists.prompts.len(), 2);
        (0..KEPT + 1).for_each(|_| lists.clear());
        assert!(lists.prompts.is_empty());
        assert_eq!(lists.add(&SampleRow::new(Arc::default())), None);
    }

    /// The bits lie where the kernel looks: word `lane` of a part is read by lane `lane`, and step `k` tests bit `lane`
    /// of word `k` for column `32 k + lane`.
    #[test]
    fn masks_lie_as_the_kernel_reads_them() {
        for (vocab, width) in [(1, 1), (1024, 1024), (3000, 2990), (3000, 5000), (201_088, 201_080)] {
            let mut lists = Lists::new(vocab);
            let mut mask = TokenMask::none(width);
            (0..width as u32)
                .filter(|id| id.wrapping_mul(2_654_435_761) >> 30 == 0)
                .for_each(|id| mask.allow(id));
            let mut row = SampleRow::new(Arc::default());
            assert_eq!(lists.add_mask(&row), None);
            row.mask = Some(Arc::new(mask.clone()));
            row.banned = Arc::from([0]);
            lists.add(&row).unwrap();
            let start = lists.add_mask(&row).unwrap() as usize;
            let parts = vocab.div_ceil(PART);
            assert_eq!(lists.words().len(), start + parts * MASK_WORDS);
            for column in 0..vocab {
                let (part, k, lane) = (column / PART, column % PART / 32, column % 32);
                let word = lists.words()[start + part * MASK_WORDS + k];
                assert_eq!(word >> lane & 1 == 1, mask.allows(column as u32), "{column} of {vocab}");
            }
            assert_eq!(
                line(&row, Some(0), Some(start as u32)).flags & (ADJUSTED | MASKED),
                ADJUSTED | MASKED
            );
        }
    }

    #[test]
    fn draws_are_those_of_the_cpu() {
        for seed in [0, 1, 42, u64::MAX] {
            for step in [0, 1, 2, 1000, u64::MAX] {
                assert_eq!(uniform(seed, step), ctxserve_cpu::uniform(seed, step));
            }
        }
    }

    #[test]
    fn the_inverse_temperature_is_exact_and_finite() {
        for temperature in [1.0, 0.7, 2.0, 1e-3, f32::MIN_POSITIVE, 1e-45] {
            let params = SamplingParams { temperature, ..SamplingParams::default() };
            let line = line(&SampleRow::new(Arc::new(params)), None, None);
            let sum = f64::from(line.inverse) + f64::from(line.inverse_rest);
            let want = (1.0 / f64::from(temperature)).min(f64::from(f32::MAX));
            assert!(
                (sum / want - 1.0).abs() < if want < 1e30 { 1e-14 } else { 1e-7 },
                "{temperature}: {sum}"
            );
        }
    }
}
