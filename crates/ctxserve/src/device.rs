//! The one place that names backends.

use std::time::{Duration, Instant};

use anyhow::bail;
use ctxserve_backend::{Backend, KvDtype};
use ctxserve_checkpoint::Checkpoint;
use ctxserve_cpu::{CpuBackend, CpuOptions, Precision};
use ctxserve_engine::{Bytes, ModelRunner, Runner};
use ctxserve_models::{LoadOptions, LoadProgress, load};

use crate::cli::options::{Device, DeviceOptions, KvChoice};

/// Most tokens of one step on the CPU: longer prefill chunks are no faster and cost memory.
const CPU_MAX_CHUNK: usize = 2048;
/// Where nothing is asked for.
const CPU_CHUNK: usize = 512;
/// Seconds between two lines on how loading goes.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// What was decided for a device, and what to tell the user about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How the KV cache is stored.
    pub kv_dtype: KvDtype,
    /// Most tokens of one step.
    pub chunk: usize,
    /// Requests that are met in another way.
    pub notes: Vec<String>,
}

/// Decides what the device does with what was asked for.
///
/// # Errors
/// A device that this build does not have.
pub fn plan(options: &DeviceOptions, chunk: Option<usize>) -> anyhow::Result<Plan> {
    if options.device == Device::Cuda {
        bail!("--device cuda: this build has no CUDA backend yet; use --device cpu or auto");
    }
    let mut notes = Vec::new();
    let kv_dtype = match options.kv_dtype {
        KvChoice::Auto | KvChoice::F32 => KvDtype::F32,
        KvChoice::Bf16 => KvDtype::Bf16,
        KvChoice::Fp8 => {
            notes.push("--kv-cache-dtype fp8: the CPU keeps keys and values in bfloat16 instead".to_owned());
            KvDtype::Bf16
        }
    };
    let asked = chunk.unwrap_or(CPU_CHUNK);
    if asked > CPU_MAX_CHUNK {
        notes.push(format!(
            "--max-num-batched-tokens {asked}: the CPU takes {CPU_MAX_CHUNK} tokens a step, more are no faster"
        ));
    }
    Ok(Plan { kv_dtype, chunk: asked.min(CPU_MAX_CHUNK), notes })
}

/// Loads a checkpoint onto the device.
///
/// # Errors
/// Weights that do not fit the model, or the device.
pub fn open(
    checkpoint: &Checkpoint,
    options: &DeviceOptions,
    load_options: LoadOptions,
) -> anyhow::Result<Box<dyn Runner>> {
    let precision = if options.int8 { Precision::Int8 } else { Precision::Exact };
    let mut backend = CpuBackend::new(CpuOptions { threads: options.threads, precision, isa: None })?;
    tracing::info!("device: {}", backend.describe());
    let start = Instant::now();
    let mut reported = start;
    let mut report = |at: LoadProgress| {
        if reported.elapsed() >= REPORT_EVERY {
            reported = Instant::now();
            tracing::info!("loading weights: {} of {} parts", at.done, at.total);
        }
    };
    let model = load(checkpoint, &mut backend, &load_options, &mut report)?;
    let bytes = usize::try_from(model.info().weight_bytes).unwrap_or(usize::MAX);
    tracing::info!("weights: {} in {:.1} s", Bytes(bytes), start.elapsed().as_secs_f64());
    Ok(Box::new(ModelRunner::new(backend, model)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(device: Device, kv_dtype: KvChoice) -> DeviceOptions {
        DeviceOptions { device, int8: false, threads: None, kv_bytes: None, kv_dtype, page_size: 16 }
    }

    #[test]
    fn what_the_cpu_cannot_do_is_said() {
        let exact = plan(&options(Device::Auto, KvChoice::Auto), None).unwrap();
        assert_eq!(exact, Plan { kv_dtype: KvDtype::F32, chunk: CPU_CHUNK, notes: vec![] });
        let card = plan(&options(Device::Cpu, KvChoice::Fp8), Some(64_000)).unwrap();
        assert_eq!((card.kv_dtype, card.chunk, card.notes.len()), (KvDtype::Bf16, CPU_MAX_CHUNK, 2));
    }

    #[test]
    fn cuda_is_refused_with_a_reason() {
        let error = plan(&options(Device::Cuda, KvChoice::Auto), None).unwrap_err().to_string();
        assert!(error.contains("no CUDA backend"), "{error}");
    }
}
