use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::attention::{HEAD_DIMS, Sequences, Tables};
use ctxserve_cuda::ops::kv_gather::{Call, KvGather};

use crate::attention_decode::{KV_HEADS, PAGE, Pool};
use crate::harness::{Bench, Work};

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("kv_gather") {
        return Ok(());
    }
    HEAD_DIMS.into_iter().try_for_each(|dim| of(bench, dim))
}

fn of(bench: &Bench, dim: usize) -> Result<(), DeviceError> {
    let device = &bench.device;
    let kernel = KvGather::load_for(device, dim)?;
    for fp8 in [true, false] {
        let pool = Pool::new(bench, fp8, dim)?;
        for context in [1024, 32_768] {
            let size = KV_HEADS * context * dim;
            let (keys, values) = (device.allocate(size)?, device.allocate(size)?);
            let pages = [(); 4].map(|()| device.upload(&pool.table(bench, context / PAGE)));
            let (zero, rows) = (device.upload(&[0])?, device.upload(&[context as i32])?);
            let bytes = context * (pool.token_bytes() + 2 * KV_HEADS * dim * 2);
            let name = format!("kv_gather {} {context} of {dim}", if fp8 { "e4m3" } else { "bf16" });
            bench.time(&name, Work { bytes: bytes as f64, flops: 0.0 }, 20, |launch| {
                let pages = pages[launch % 4].as_ref().map_err(Clone::clone)?;
                let call = Call {
                    cache: pool.cache(None),
                    tables: Tables { at: &zero, first: &zero, pages },
                    sequences: Sequences {
                        first: 0,
                        count: 1,
                        first_row: &zero,
                        row_count: &rows,
                        start: &zero,
                    },
                    keys: &keys,
                    values: &values,
                    lines: context,
                };
                kernel.issue(device, &call)
            })?;
        }
    }
    Ok(())
}
