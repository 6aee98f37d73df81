use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::attention::Sequences;
use ctxserve_cuda::ops::attention_prefill::{AttentionPrefill, Call};

use crate::attention_decode::{KV_HEADS, heads_of};
use crate::harness::{Bench, Work};

/// `count` sequences of `rows` rows each, the first at position `start`.
#[allow(clippy::too_many_arguments)]
fn case(
    bench: &Bench,
    kind: &str,
    kernel: &AttentionPrefill,
    dim: usize,
    count: usize,
    start: usize,
    rows: usize,
    window: Option<usize>,
    launches: usize,
) -> Result<(), DeviceError> {
    let device = &bench.device;
    let heads = heads_of(dim);
    let first = window.map_or(0, |window| (start + 1).saturating_sub(window));
    let lines = count * (start + rows - first).next_multiple_of(128);
    let random = |count: usize| {
        let bits: Vec<u16> = (0..count).map(|_| half::bf16::from_f32(bench.unit()).to_bits()).collect();
        device.upload(&bits)
    };
    let total = count * rows;
    let q = random(total * heads * dim)?;
    let (keys, values) = (random(KV_HEADS * lines * dim)?, random(KV_HEADS * lines * dim)?);
    let sinks = device.upload(&(0..heads).map(|_| bench.unit()).collect::<Vec<_>>())?;
    let out = device.allocate(total.next_multiple_of(8) * heads * dim)?;
    let ints = |value: &dyn Fn(usize) -> usize| {
        device.upload(&(0..count).map(|s| value(s) as i32).collect::<Vec<_>>())
    };
    let (first_row, row_count, starts) = (ints(&|s| s * rows)?, ints(&|_| rows)?, ints(&|_| start)?);
    let seen: usize = (start..start + rows).map(|p| window.unwrap_or(p + 1).min(p + 1)).sum();
    let work = Work { bytes: 0.0, flops: (count * seen * heads * dim * 4) as f64 };
    let wide = window.map_or(String::new(), |window| format!(" window {window}"));
    let kind = if dim == 64 { kind.to_owned() } else { format!("{kind} {dim}") };
    let name = format!("attention_prefill {kind} {count} x {rows} at {start}{wide}");
    bench.time(&name, work, launches, |_| {
        let call = Call {
            q: &q,
            keys: &keys,
            values: &values,
            sequences: Sequences {
                first: 0,
                count,
                first_row: &first_row,
                row_count: &row_count,
                start: &starts,
            },
            sinks: Some(&sinks).filter(|_| dim == 64),
            out: &out,
            runs: count * kernel.runs_of(rows),
            rows: total,
            heads,
            kv_heads: KV_HEADS,
            lines,
            window,
            capacity: Some(total.next_multiple_of(8)),
            scale: 0.125,
        };
        kernel.issue(device, &call)
    })?;
    Ok(())
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if bench.wants("attention_prefill") {
        of(bench, 64)?;
    }
    if bench.wants("attention_prefill_128") { of(bench, 128) } else { Ok(()) }
}

fn of(bench: &Bench, dim: usize) -> Result<(), DeviceError> {
    let kernel = AttentionPrefill::load_for(&bench.device, dim)?;
    let portable = AttentionPrefill::load_portable(&bench.device, dim)?;
    let cases = [
        (1, 0, 1024, None, 20),
        (8, 0, 1024, None, 10),
        (1, 0, 8192, None, 6),
        (1, 24_576, 8192, None, 2),
        (1, 0, 32_768, None, 1),
        (1, 0, 1024, Some(128), 20),
        (8, 0, 1024, Some(128), 10),
        (1, 0, 8192, Some(128), 10),
    ];
    for (count, start, rows, window, launches) in cases {
        case(bench, "best", &kernel, dim, count, start, rows, window, launches)?;
    }
    case(bench, "portable", &portable, dim, 1, 0, 8192, None, 4)?;
    case(bench, "portable", &portable, dim, 1, 0, 8192, Some(128), 4)
}
