use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::Buffer;
use ctxserve_cuda::ops::gemv::{Plan, Variant};
use ctxserve_cuda::ops::gemv_out;
use ctxserve_cuda::ops::gemv_qkv::{Call, Dims, GemvQkv};
use half::bf16;

use crate::harness::{Bench, Work};

pub(crate) const LAYERS: usize = 24;
const COLS: usize = 2880;
const Q: usize = 4096;
const KV: usize = 512;
const OUTPUTS: usize = Q + 2 * KV;

/// Every layer's weights, the same random bits in memory of their own.
pub(crate) fn layers(bench: &Bench, len: usize) -> Result<Vec<Buffer<u16>>, DeviceError> {
    layers_of(bench, LAYERS, len)
}

/// So many layers' weights.
pub(crate) fn layers_of(bench: &Bench, layers: usize, len: usize) -> Result<Vec<Buffer<u16>>, DeviceError> {
    let bits: Vec<u16> = (0..len).map(|_| bf16::from_f32(bench.unit() * 0.02).to_bits()).collect();
    (0..layers).map(|_| bench.device.upload(&bits)).collect()
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("gemv_qkv") {
        return Ok(());
    }
    let device = &bench.device;
    let values: Vec<f32> = (0..16 * COLS).map(|_| bench.unit()).collect();
    let weights = layers(bench, OUTPUTS * COLS)?;
    let (x, vector) = (device.upload(&values)?, device.upload(&values[..OUTPUTS])?);
    let (positions, inv_freq) = (device.upload(&[70_000; 16])?, device.upload(&values[..32])?);
    let (q, kv) = (device.zeros(16 * Q)?, device.zeros(16 * 2 * KV)?);
    let live = (0..=16).map(|rows| device.upload(&[rows])).collect::<Result<Vec<_>, _>>()?;
    let call = |layer: usize, rows: usize| Call {
        weights: &weights[layer % LAYERS],
        bias: &vector,
        norm: &vector,
        x: &x,
        live: &live[rows],
        positions: &positions,
        inv_freq: &inv_freq,
        q: &q,
        kv: &kv,
        norm_cols: COLS,
        eps: 1e-5,
        mscale: 1.3,
    };
    let work = |rows: usize| Work {
        bytes: (OUTPUTS * COLS * 2 + rows * (COLS * 4 + Q * 2 + KV * 8)) as f64,
        flops: (2 * OUTPUTS * COLS * rows) as f64,
    };
    let dims = |rows| Dims { rows, cols: COLS, q_width: Q, kv_width: KV };
    for rows in [1, 4, 8, 16] {
        for plan in distinct(GemvQkv::plans(device, dims(rows))?) {
            let kernel = GemvQkv::with_plan(device, dims(rows), plan)?;
            bench.time(&format!("gemv_qkv {rows} rows, {plan}"), work(rows), 2 * LAYERS, |layer| {
                kernel.issue(device, &call(layer, rows))
            })?;
        }
    }
    // As in a layer, less attention between them: both, alternately.
    let of_out = layers(bench, COLS * Q)?;
    for rows in [1, 4, 16] {
        let both = Work {
            bytes: work(rows).bytes + (COLS * Q * 2) as f64,
            flops: work(rows).flops + (2 * COLS * Q * rows) as f64,
        };
        let out_dims = gemv_out::Dims { rows, q_width: Q, hidden: COLS };
        let of_qkv = distinct(GemvQkv::plans(device, dims(rows))?);
        let out_plans = distinct(gemv_out::GemvOut::plans(device, out_dims)?);
        for (qkv_plan, out_plan) in of_qkv.iter().flat_map(|a| out_plans.iter().map(move |b| (*a, *b))) {
            let kernel = GemvQkv::with_plan(device, dims(rows), qkv_plan)?;
            let out = gemv_out::GemvOut::with_plan(device, out_dims, out_plan)?;
            let of = |plan: &Plan| {
                format!(
                    "{}x{} split {} launch {}",
                    plan.variant.tiles, plan.variant.stages, plan.variant.split, plan.variant.launch
                )
            };
            let name = format!("gemv_qkv, gemv_out {rows} rows, {} and {}", of(&qkv_plan), of(&out_plan));
            bench.time(&name, both, LAYERS, |layer| {
                kernel.issue(device, &call(layer, rows))?;
                let (weights, live) = (&of_out[layer], &live[rows]);
                out.issue(device, &gemv_out::Call { weights, bias: &vector, heads: &q, x: &x, live })
            })?;
        }
    }
    Ok(())
}

/// Those worth comparing: the widest tiles, in every way, and when the next kernel may start.
pub(crate) fn distinct(plans: Vec<Plan>) -> Vec<Plan> {
    let widest = plans.iter().map(|plan| plan.variant.tiles).max().unwrap_or_default();
    let lines = plans.iter().map(|plan| plan.lines).max().unwrap_or_default();
    let keep = |plan: &Plan| plan.variant.tiles == widest && plan.lines == lines;
    let mut found = Vec::new();
    for plan in plans.into_iter().filter(keep) {
        let launches: &[usize] = if plan.variant.split { &[2, 5] } else { &[plan.variant.launch] };
        found.extend(
            launches.iter().map(|&launch| Plan { variant: Variant { launch, ..plan.variant }, ..plan }),
        );
    }
    found
}
