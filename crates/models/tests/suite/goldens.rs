//! Every golden against transformers' float32 logits and greedy ids: on the plain loops and on the kernels, alone and
//! among strangers, whatever the chunking.

use crate::common::{Case, Driver, Random, Sequence, argmax, cases, open, relative_l2};
use ctxserve_cpu::{CpuBackend, CpuOptions, Precision};

/// The project's promise per step.
const TOLERANCE: f64 = 1e-4;

pub(crate) fn exact() -> CpuBackend {
    CpuBackend::new(CpuOptions { precision: Precision::Exact, ..CpuOptions::default() }).unwrap()
}

/// Holds the logits that follow `position` against what is known of them.
fn hold(case: &Case, position: usize, logits: &[f32], what: &str) {
    if let Some(expected) = case.expected(position) {
        let distance = relative_l2(logits, expected);
        assert!(distance < TOLERANCE, "{what}, position {position}: relative L2 {distance:e}");
    }
    if let Some(step) = (position + 1).checked_sub(case.prompt.len()) {
        assert_eq!(argmax(logits), case.greedy[step], "{what}, greedy step {step}");
    }
}

/// Feeds a case alone: the prompt in chunks, then token by token.
fn alone(driver: &mut Driver, case: &Case, chunk: usize) {
    let what = format!("prompt of {} in chunks of {chunk}", case.prompt.len());
    let (fed, mut sequence, mut position) = (case.fed(), Sequence::default(), 0);
    while position < fed.len() {
        let more = case.prompt.len().saturating_sub(position).clamp(1, chunk);
        let logits = driver.step(&mut [(&mut sequence, &fed[position..position + more], true)]);
        position += more;
        hold(case, position - 1, &logits[0], &what);
    }
    driver.finish(sequence);
}

/// Feeds all cases at once, each with its own chunk size and a late start, among strangers whose logits nobody checks.
/// Some chunks ask for no logits.
fn together(driver: &mut Driver, cases: &[Case]) {
    let vocab = driver.vocab();
    let mut random = Random(7);
    let strangers: Vec<_> = [1, 33, 250].map(|length| random.ids(length, vocab)).into();
    let known: Vec<_> = cases.iter().map(Case::fed).collect();
    let all: Vec<&[u32]> = known.iter().chain(&strangers).map(Vec::as_slice).collect();
    let prompt = |i: usize| cases.get(i).map_or(all[i].len(), |case| case.prompt.len());
    let mut sequences: Vec<Sequence> = all.iter().map(|_| Sequence::default()).collect();
    let mut positions = vec![0; all.len()];
    for step in 0.. {
        let mut work = Vec::new();
        let mut wanted = Vec::new();
        for i in cases.len()..all.len() {
            // A stranger that is through leaves its pages to the others, and another comes.
            if positions[i] == all[i].len() {
                driver.finish(std::mem::take(&mut sequences[i]));
                positions[i] = 0;
            }
        }
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let start = positions[i];
            if start == all[i].len() || step < 3 * i {
                continue;
            }
            let most = prompt(i).saturating_sub(start).clamp(1, 1 + random.below(150));
            let more = most.min(all[i].len() - start);
            positions[i] += more;
            let sample = positions[i] >= prompt(i) || random.below(2) == 0;
            if sample {
                wanted.push((i, positions[i] - 1));
            }
            work.push((sequence, &all[i][start..start + more], sample));
        }
        let logits = driver.step(&mut work);
        assert_eq!(logits.len(), wanted.len());
        for ((i, position), row) in wanted.into_iter().zip(&logits) {
            if let Some(case) = cases.get(i) {
                hold(case, position, row, &format!("case {i} among strangers"));
            }
        }
        if (0..cases.len()).all(|i| positions[i] == all[i].len()) {
            break;
        }
    }
    sequences.into_iter().for_each(|sequence| driver.finish(sequence));
}

/// All of the above. `expected` names the golden whose expectations hold for `checkpoint`.
fn check(checkpoint: &str, expected: &str, backend: CpuBackend, chunks: &[usize]) {
    const PAGES: usize = 600;
    let cases = cases(expected);
    let mut driver = Driver::new(&open(checkpoint), backend, PAGES);
    for case in &cases {
        alone(&mut driver, case, usize::MAX);
        // A chunk beyond the prompt would repeat the whole.
        for &chunk in chunks.iter().filter(|&&chunk| chunk < case.prompt.len()) {
            alone(&mut driver, case, chunk);
        }
    }
    together(&mut driver, &cases);
    assert!(driver.free_pages().iter().all(|&free| free == PAGES), "pages were lost");
}

const CHUNKS: [usize; 5] = [1, 7, 64, 128, 129];

macro_rules! goldens {
    ($($test:ident: $checkpoint:literal as $expected:literal, $backend:expr, $chunks:expr;)+) => {
        $(#[test]
        fn $test() {
            check($checkpoint, $expected, $backend, $chunks);
        })+
    };
}

goldens! {
    mxfp4_exact: "mxfp4" as "mxfp4", exact(), &CHUNKS;
    mxfp4_plain: "mxfp4" as "mxfp4", CpuBackend::plain(), &[129];
    // Same weights, stored dense: the same logits.
    dense_exact: "dense" as "mxfp4", exact(), &CHUNKS;
    dense_plain: "dense" as "mxfp4", CpuBackend::plain(), &[64];
    sharded_exact: "sharded" as "sharded", exact(), &CHUNKS;
    sharded_plain: "sharded" as "sharded", CpuBackend::plain(), &[7];
    unusual_exact: "unusual" as "unusual", exact(), &CHUNKS;
    unusual_plain: "unusual" as "unusual", CpuBackend::plain(), &CHUNKS;
    truncated_exact: "truncated" as "truncated", exact(), &CHUNKS;
    truncated_plain: "truncated" as "truncated", CpuBackend::plain(), &[64];
    saved_exact: "saved" as "saved", exact(), &CHUNKS;
    saved_plain: "saved" as "saved", CpuBackend::plain(), &[7];
    served_exact: "served" as "served", exact(), &CHUNKS;
    served_plain: "served" as "served", CpuBackend::plain(), &[64];
    long_exact: "long" as "long", exact(), &[129, 1000];
    long_plain: "long" as "long", CpuBackend::plain(), &[];
    mlx_exact: "mlx" as "mlx", exact(), &CHUNKS;
    mlx_plain: "mlx" as "mlx", CpuBackend::plain(), &[64];
    mlx_mxfp4_exact: "mlx_mxfp4" as "mlx_mxfp4", exact(), &CHUNKS;
    mlx_mxfp4_plain: "mlx_mxfp4" as "mlx_mxfp4", CpuBackend::plain(), &[64];
    qwen3_exact: "qwen3" as "qwen3", exact(), &CHUNKS;
    qwen3_plain: "qwen3" as "qwen3", CpuBackend::plain(), &[64];
    qwen3_untied_exact: "qwen3_untied" as "qwen3_untied", exact(), &CHUNKS;
    qwen3_untied_plain: "qwen3_untied" as "qwen3_untied", CpuBackend::plain(), &[7];
    qwen3_nvfp4_exact: "qwen3_nvfp4" as "qwen3_nvfp4", exact(), &CHUNKS;
    qwen3_nvfp4_plain: "qwen3_nvfp4" as "qwen3_nvfp4", CpuBackend::plain(), &[129];
    qwen3_nvfp4_packed_exact: "qwen3_nvfp4_packed" as "qwen3_nvfp4_packed", exact(), &CHUNKS;
    qwen3_served_exact: "qwen3_served" as "qwen3_served", exact(), &CHUNKS;
    qwen3_nvfp4_packed_plain: "qwen3_nvfp4_packed" as "qwen3_nvfp4_packed", CpuBackend::plain(), &[64];
}
