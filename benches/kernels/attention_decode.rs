use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::Buffer;
use ctxserve_cuda::ops::attention::{Cache, HEAD_DIM, Tables};
use ctxserve_cuda::ops::attention_decode::{AttentionDecode, Call, Workspace, splits};

use crate::harness::{Bench, Work};

pub(crate) const HEADS: usize = 64;
pub(crate) const KV_HEADS: usize = 8;
pub(crate) const PAGE: usize = 64;

/// A pool of random pages, much larger than L2. Tables of large batches name pages more than once.
#[derive(Debug)]
pub(crate) struct Pool {
    data: Buffer<u32>,
    scales: Buffer<f32>,
    pages: usize,
    fp8: bool,
}

impl Pool {
    pub(crate) fn new(bench: &Bench, fp8: bool) -> Result<Self, DeviceError> {
        let pages = if fp8 { 6144 } else { 3072 };
        let lines = pages * 2 * KV_HEADS * PAGE;
        // Codes below 2, or bf16 of either sign below 2: no infinities and no NaN.
        let mask = if fp8 { 0xbfbf_bfbf } else { 0xbfff_bfff };
        let words = lines * HEAD_DIM / if fp8 { 4 } else { 2 };
        let data: Vec<u32> = (0..words).map(|_| bench.bits() as u32 & mask).collect();
        let scales: Vec<f32> = (0..if fp8 { lines } else { 0 }).map(|_| 0.02 + 0.01 * bench.unit()).collect();
        Ok(Self { data: bench.device.upload(&data)?, scales: bench.device.upload(&scales)?, pages, fp8 })
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
        2 * KV_HEADS * if self.fp8 { HEAD_DIM + 4 } else { HEAD_DIM * 2 }
    }
}

/// One row of every sequence at the end of `context` positions.
fn case(
    bench: &Bench,
    pool: &Pool,
    rows: usize,
    context: usize,
    window: Option<usize>,
    splits: usize,
) -> Result<(), DeviceError> {
    let device = &bench.device;
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
    let q: Vec<u16> = values(rows * HEADS * HEAD_DIM).map(|v| half::bf16::from_f32(v).to_bits()).collect();
    let q = device.upload(&q)?;
    let kv = device.upload(&values(rows * 2 * KV_HEADS * HEAD_DIM).collect::<Vec<_>>())?;
    let sinks = device.upload(&values(HEADS).collect::<Vec<_>>())?;
    let capacity = rows.next_multiple_of(8);
    let out = device.allocate(capacity * HEADS * HEAD_DIM)?;
    let workspace = Workspace::new(device, rows, KV_HEADS, splits)?;
    let kernel = AttentionDecode::load(device)?;
    let work = Work {
        bytes: (rows * (seen * pool.token_bytes() + HEADS * HEAD_DIM * 4)) as f64,
        flops: (rows * seen * HEADS * HEAD_DIM * 4) as f64,
    };
    let kind = if pool.fp8 { "e4m3" } else { "bf16" };
    let name = format!("attention_decode {kind} {rows} x {seen}, {splits} splits");
    bench.time(&name, work, launches, |launch| {
        let call = Call {
            q: &q,
            kv: Some(&kv),
            cache: pool.cache(window),
            tables: Tables { at: &at, first: &first, pages: &tables[launch] },
            position: &position,
            slot: &slot,
            live: &live,
            sinks: Some(&sinks),
            out: &out,
            workspace: &workspace,
            rows,
            heads: HEADS,
            splits,
            capacity: Some(capacity),
            scale: 0.125,
        };
        kernel.issue(device, &call)
    })?;
    Ok(())
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("attention_decode") {
        return Ok(());
    }
    let multiprocessors = bench.device.facts().multiprocessors as usize;
    let pool = Pool::new(bench, true)?;
    for rows in [1, 4, 8, 16, 32, 64, 256] {
        for context in [1024, 8192, 32_768] {
            let planned = splits(rows, &pool.cache(None), multiprocessors);
            for splits in [planned, 1] {
                case(bench, &pool, rows, context, None, splits)?;
            }
        }
    }
    drop(pool);
    let pool = Pool::new(bench, false)?;
    for rows in [1, 16, 64, 256] {
        case(bench, &pool, rows, 1024, Some(128), 1)?;
    }
    for splits in [1, 2] {
        case(bench, &pool, 1, 1024, Some(128), splits)?;
    }
    case(bench, &pool, 16, 8192, None, splits(16, &pool.cache(None), multiprocessors))?;
    Ok(())
}
