use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::Buffer;
use ctxserve_cuda::ops::attention::{Cache, HeadNorms, Tables};
use ctxserve_cuda::ops::attention_decode::{AttentionDecode, Call, Queries, Workspace, splits};

use crate::harness::{Bench, Work};

/// Query heads of 64 elements of gpt-oss-20b, and of 128 of Qwen3-4B.
pub(crate) const fn heads_of(dim: usize) -> usize {
    if dim == 64 { 64 } else { 32 }
}
pub(crate) const KV_HEADS: usize = 8;
pub(crate) const PAGE: usize = 64;

/// A pool of random pages, much larger than L2. Tables of large batches name pages more than once.
#[derive(Debug)]
pub(crate) struct Pool {
    data: Buffer<u32>,
    scales: Buffer<f32>,
    pages: usize,
    fp8: bool,
    dim: usize,
}

impl Pool {
    pub(crate) fn new(bench: &Bench, fp8: bool, dim: usize) -> Result<Self, DeviceError> {
        let pages = if fp8 { 6144 } else { 3072 } * 64 / dim;
        let lines = pages * 2 * KV_HEADS * PAGE;
        // Codes below 2, or bf16 of either sign below 2: no infinities and no NaN.
        let mask = if fp8 { 0xbfbf_bfbf } else { 0xbfff_bfff };
        let words = lines * dim / if fp8 { 4 } else { 2 };
        let data: Vec<u32> = (0..words).map(|_| bench.bits() as u32 & mask).collect();
        let scales: Vec<f32> = (0..if fp8 { lines } else { 0 }).map(|_| 0.02 + 0.01 * bench.unit()).collect();
        Ok(Self { data: bench.device.upload(&data)?, scales: bench.device.upload(&scales)?, pages, fp8, dim })
    }

    pub(crate) fn cache(&self, window: Option<usize>) -> Cache {
        let scales = if self.fp8 { self.scales.address() } else { 0 };
        Cache { data: self.data.address(), scales, page_size: PAGE, kv_heads: KV_HEADS, window }
    }

    /// Random entries of page tables.
    pub(crate) fn table(&self, bench: &Bench, entries: usize) -> Vec<i32> {
        (0..entries).map(|_| (bench.bits() % self.pages as u64) as i32).collect()
    }

    /// Bytes of a token's keys and values.
    pub(crate) fn token_bytes(&self) -> usize {
        2 * KV_HEADS * if self.fp8 { self.dim + 4 } else { self.dim * 2 }
    }
}

/// One row of every sequence at the end of `context` positions; `raw`: with all that `kv_append` else does.
fn case(
    bench: &Bench,
    pool: &Pool,
    raw: bool,
    rows: usize,
    context: usize,
    window: Option<usize>,
    splits: usize,
) -> Result<(), DeviceError> {
    let device = &bench.device;
    let (dim, heads) = (pool.dim, heads_of(pool.dim));
    let seen = window.unwrap_or(context).min(context);
    let entries = context.div_ceil(PAGE) - (context - seen) / PAGE;
    let launches = (400_000_000 / (rows * seen * pool.token_bytes())).clamp(3, 64);
    let mut tables = Vec::new();
    for _ in 0..launches {
        tables.push(device.upload(&pool.table(bench, rows * entries))?);
    }
    let ints = |value: &mut dyn FnMut(usize) -> usize| {
        device.upload(&(0..rows).map(|row| value(row) as i32).collect::<Vec<_>>())
    };
    let at = ints(&mut |row| row * entries)?;
    let first = ints(&mut |_| (context - seen) / PAGE)?;
    let position = ints(&mut |_| context - 1)?;
    let slot = ints(&mut |row| row % pool.pages * PAGE + (context - 1) % PAGE)?;
    let live = device.upload(&[rows as i32])?;
    let values = |count: usize| (0..count).map(|_| bench.unit());
    let q: Vec<u16> = values(rows * heads * dim).map(|v| half::bf16::from_f32(v).to_bits()).collect();
    let q = device.upload(&q)?;
    let qkv = device.upload(&values(rows * (heads + 2 * KV_HEADS) * dim).collect::<Vec<_>>())?;
    let (sinks, norm) = (device.upload(&vec![0.5_f32; heads])?, device.upload(&vec![1_f32; dim])?);
    let inv_freq: Vec<f32> =
        (0..dim / 2).map(|i| 5e6_f64.powf(-2.0 * i as f64 / dim as f64) as f32).collect();
    let inv_freq = device.upload(&inv_freq)?;
    // gpt-oss has sinks, Qwen3 norms.
    let norms = (dim == 128).then_some(HeadNorms { q: &norm, k: &norm, eps: 1e-6 });
    let queries = if raw {
        Queries::Raw { qkv: &qkv, norms, inv_freq: &inv_freq, mscale: 1.0 }
    } else {
        Queries::Rotated { q: &q, kv: Some(&qkv) }
    };
    let capacity = rows.next_multiple_of(8);
    let out = device.allocate(capacity * heads * dim)?;
    let workspace = Workspace::new_for(device, dim, rows, KV_HEADS, splits)?;
    let kernel = AttentionDecode::load_for(device, dim)?;
    let work = Work {
        bytes: (rows * (seen * pool.token_bytes() + heads * dim * 4)) as f64,
        flops: (rows * seen * heads * dim * 4) as f64,
    };
    let kind = if pool.fp8 { "e4m3" } else { "bf16" };
    let kind = format!("{kind}{}{}", if dim == 64 { "" } else { " 128" }, if raw { " raw" } else { "" });
    let name = format!("attention_decode {kind} {rows} x {seen}, {splits} splits");
    bench.time(&name, work, launches, |launch| {
        let call = Call {
            queries,
            cache: pool.cache(window),
            tables: Tables { at: &at, first: &first, pages: &tables[launch] },
            position: &position,
            slot: &slot,
            live: &live,
            sinks: Some(&sinks).filter(|_| dim == 64),
            out: &out,
            workspace: &workspace,
            rows,
            heads,
            splits,
            capacity: Some(capacity),
            scale: 0.125,
        };
        kernel.issue(device, &call)
    })?;
    Ok(())
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if bench.wants("attention_decode") {
        of_64(bench)?;
    }
    if bench.wants("attention_decode_128") { of_128(bench) } else { Ok(()) }
}

fn of_64(bench: &Bench) -> Result<(), DeviceError> {
    let multiprocessors = bench.device.facts().multiprocessors as usize;
    let pool = Pool::new(bench, true, 64)?;
    for rows in [1, 4, 8, 16, 32, 64, 256] {
        for context in [1024, 8192, 32_768] {
            let planned = splits(rows, &pool.cache(None), multiprocessors);
            for splits in [planned, 1] {
                case(bench, &pool, false, rows, context, None, splits)?;
            }
        }
        case(bench, &pool, true, rows, 1024, None, splits(rows, &pool.cache(None), multiprocessors))?;
    }
    drop(pool);
    let pool = Pool::new(bench, false, 64)?;
    for rows in [1, 16, 64, 256] {
        case(bench, &pool, false, rows, 1024, Some(128), 1)?;
    }
    for splits in [1, 2] {
        case(bench, &pool, false, 1, 1024, Some(128), splits)?;
    }
    case(bench, &pool, false, 16, 8192, None, splits(16, &pool.cache(None), multiprocessors))
}

fn of_128(bench: &Bench) -> Result<(), DeviceError> {
    let multiprocessors = bench.device.facts().multiprocessors as usize;
    let pool = Pool::new(bench, true, 128)?;
    for rows in [1, 4, 8, 16, 32, 64, 256] {
        for context in [256, 1024, 8192] {
            let planned = splits(rows, &pool.cache(None), multiprocessors);
            for raw in [false, true] {
                case(bench, &pool, raw, rows, context, None, planned)?;
            }
        }
    }
    drop(pool);
    let pool = Pool::new(bench, false, 128)?;
    for (rows, context) in [(1, 1024), (16, 1024), (64, 1024), (256, 1024)] {
        let planned = splits(rows, &pool.cache(None), multiprocessors);
        case(bench, &pool, true, rows, context, None, planned)?;
    }
    Ok(())
}
