//! How much memory there is, and how much of it the KV cache gets.

use std::fs;

use anyhow::bail;
use ctxserve_backend::KvSpec;
use ctxserve_engine::Bytes;

use crate::cli::options::EngineOptions;

/// The KV cache is made at least this large, if half of the free memory allows it.
const COMFORTABLE: usize = 2 << 30;

/// What the engine is told about the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBudget {
    /// Bytes.
    pub bytes: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Set when `max_model_len` is less than the profile or the model promises.
    pub shortened_from: Option<usize>,
}

/// Decides the KV cache's size and the longest sequence, before any weight is read. A length that a profile or the
/// model promises is cut to what fits.
///
/// `chunk` is the most tokens of one step, `free` the bytes left beside the weights, if known.
///
/// # Errors
/// A length that the user asked for and that the model or the memory does not have.
pub fn budget(
    spec: &KvSpec,
    max_context: usize,
    chunk: usize,
    engine: &EngineOptions,
    kv_bytes: Option<usize>,
    free: Option<usize>,
) -> anyhow::Result<KvBudget> {
    let wanted = match engine.max_model_len {
        Some(length) if engine.strict_len => length,
        length => length.map_or(max_context, |length| length.min(max_context)),
    };
    let needed = bytes_of_one(spec, wanted, chunk);
    let bytes = kv_bytes.unwrap_or_else(|| {
        let most = free.map_or(COMFORTABLE, |free| free / 2);
        needed.max(COMFORTABLE).min(most)
    });
    if engine.strict_len && wanted > max_context {
        bail!("--max-model-len {wanted} exceeds the model's {max_context} positions");
    }
    if needed <= bytes {
        return Ok(KvBudget { bytes, max_model_len: wanted, shortened_from: None });
    }
    let (mut fits, mut over) = (1, wanted);
    while over - fits > 1 {
        let middle = fits + (over - fits) / 2;
        if bytes_of_one(spec, middle, chunk) <= bytes { fits = middle } else { over = middle }
    }
    if engine.strict_len {
        bail!(
            "--max-model-len {wanted} needs a KV cache of {}, and it has {}, enough for {fits} tokens; see \
             --kv-cache-memory-bytes and --kv-cache-dtype",
            Bytes(needed),
            Bytes(bytes)
        );
    }
    Ok(KvBudget { bytes, max_model_len: fits, shortened_from: Some(wanted) })
}

/// Bytes that one sequence of this length needs, when a step appends at most `chunk` tokens to it.
pub fn bytes_of_one(spec: &KvSpec, length: usize, chunk: usize) -> usize {
    (0..spec.groups.len())
        .map(|group| spec.pages_for(group, length, chunk.min(length)).saturating_mul(spec.page_bytes(group)))
        .fold(0, usize::saturating_add)
}

/// Bytes that this process may still take: what the system has free, or less where a control group limits it.
/// `None` where the system does not say.
pub fn free_bytes() -> Option<usize> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    let limit = number("/sys/fs/cgroup/memory.max");
    let used = number("/sys/fs/cgroup/memory.current");
    let group = limit.map(|limit| limit.saturating_sub(used.unwrap_or(0)));
    match (system, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// `MemAvailable` of `/proc/meminfo`, bytes.
fn mem_available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ctxserve_backend::{KvDtype, KvGroup};

    /// One token costs 1 KiB.
    fn spec() -> KvSpec {
        let groups = vec![KvGroup { window: None, layers: vec![0], dtype: KvDtype::F32 }];
        KvSpec { page_size: 16, kv_heads: 2, head_dim: 64, groups }
    }

    fn engine(max_model_len: Option<usize>, strict_len: bool) -> EngineOptions {
        EngineOptions {
            max_model_len,
            strict_len,
            max_num_seqs: 1,
            max_batched_tokens: None,
            max_queued_requests: 1,
            max_queued_tokens: 1,
            prefix_caching: true,
        }
    }

    #[test]
    fn there_is_room_for_the_longest_sequence_if_memory_allows() {
        let most = 4 << 20;
        let found = budget(&spec(), most, 512, &engine(None, false), None, Some(16 << 30)).unwrap();
        assert_eq!(found, KvBudget { bytes: 4 << 30, max_model_len: most, shortened_from: None });
        let found = budget(&spec(), 4096, 512, &engine(None, false), None, Some(16 << 30)).unwrap();
        assert_eq!((found.bytes, found.max_model_len), (COMFORTABLE, 4096));
    }

    #[test]
    fn a_promise_is_cut_and_a_demand_is_not() {
        let soft =
            budget(&spec(), 1 << 20, 512, &engine(Some(100_000), false), Some(10 << 20), None).unwrap();
        assert_eq!(soft.shortened_from, Some(100_000));
        assert_eq!(soft.max_model_len, 10 << 10);
        let strict = budget(&spec(), 1 << 20, 512, &engine(Some(100_000), true), Some(10 << 20), None);
        let error = strict.unwrap_err().to_string();
        assert!(error.contains("KV cache") && error.contains("10240 tokens"), "{error}");
        let longer = budget(&spec(), 1000, 512, &engine(Some(5000), true), None, None);
        assert!(longer.unwrap_err().to_string().contains("1000 positions"));
        let cut_to_the_model = budget(&spec(), 1000, 512, &engine(Some(5000), false), None, None).unwrap();
        assert_eq!(cut_to_the_model.max_model_len, 1000);
    }

    #[test]
    fn half_of_the_free_memory_is_left_alone() {
        let found = budget(&spec(), 1 << 30, 512, &engine(None, false), None, Some(1 << 30)).unwrap();
        assert_eq!(found.bytes, 1 << 29);
        assert!(found.max_model_len <= 1 << 19 && found.shortened_from.is_some());
    }

    #[test]
    fn meminfo_is_read() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(mem_available("MemTotal: 9 kB"), None);
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
    }
}
