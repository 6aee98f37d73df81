//! The one place that names backends.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use ctxserve_backend::conformance::Like;
use ctxserve_backend::{Backend, KvDtype};
use ctxserve_checkpoint::{Checkpoint, Shape};
use ctxserve_core::Encoding;
pub use ctxserve_cpu::Product;
use ctxserve_cpu::{ActivationQuant, CpuBackend, CpuOptions, InputPeaks, Precision};
use ctxserve_cuda::driver::Device as Gpu;
use ctxserve_cuda::{Capacity, CudaBackend, CudaOptions, Widths};
use ctxserve_engine::{Bytes, ModelRunner, Runner};
use ctxserve_models::{LoadOptions, LoadProgress, ModelInfo, load, wants};

use crate::cli::options::{Device, DeviceOptions, KvChoice};
use crate::memory::free_bytes;

/// Most tokens of one step on the CPU: longer prefill chunks are no faster and cost memory.
const CPU_MAX_CHUNK: usize = 2048;
/// Where nothing is asked for.
const CPU_CHUNK: usize = 512;
/// Most tokens of one step on a GPU, whose workspace grows with them.
const GPU_MAX_CHUNK: usize = 16_384;
/// Where nothing is asked for.
const GPU_CHUNK: usize = 8192;
/// Device memory that the driver and recorded graphs take beside what is allocated.
const GPU_RESERVE: usize = 512 << 20;
/// The self-test takes a second; a kernel that hangs takes for ever.
const SELF_TEST_TIME: Duration = Duration::from_secs(60);
/// Seconds between two lines on how loading goes.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Where the model runs.
#[derive(Clone, Debug)]
pub enum Target {
    /// This machine's processor.
    Cpu,
    /// A CUDA device.
    Gpu(Gpu),
}

/// What was decided for a device, and what to tell the user about it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the model runs.
    pub target: Target,
    /// How the KV cache is stored.
    pub kv_dtype: KvDtype,
    /// Positions per KV page.
    pub page_size: usize,
    /// Most tokens of one step.
    pub chunk: usize,
    /// Sequences of one step, where nothing is asked for.
    pub sequences: usize,
    /// Requests that are met in another way.
    pub notes: Vec<String>,
}

/// Limits of the engine that size a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of one step.
    pub chunk: usize,
    /// Most sequences of one step.
    pub sequences: usize,
    /// Longest sequence.
    pub context: usize,
}

/// Memory beside the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the weights there, counted off already.
    pub weights: usize,
    /// Bytes for the KV cache, if known.
    pub free: Option<usize>,
    /// Bytes that the device takes for what flows between ops, counted off already.
    pub workspace: usize,
    /// Bytes left to the driver and to recorded graphs, counted off already.
    pub reserve: usize,
    /// Whether the KV cache takes all of it, or as much as is sensible.
    pub take_all: bool,
}

/// What is done instead where a GPU was taken by itself and turns out not to do: `None` where it was asked for.
pub fn instead(
    options: &DeviceOptions,
    chunk: Option<usize>,
    plan: &Plan,
    why: &anyhow::Error,
) -> Option<Plan> {
    let by_itself = options.device == Device::Auto && matches!(plan.target, Target::Gpu(_));
    by_itself.then(|| cpu_plan(options, chunk, vec![format!("no GPU is used: {why:#}")]))
}

/// A backend that keeps the largest inputs of the products that it computes.
///
/// # Errors
/// The system gives no threads.
pub fn observer() -> anyhow::Result<(CpuBackend, InputPeaks)> {
    let mut backend = CpuBackend::new(CpuOptions::default())?;
    let peaks = backend.observe_inputs();
    Ok((backend, peaks))
}

/// Decides what the device does with what was asked for.
///
/// # Errors
/// A device that cannot be used, with the reason.
pub fn plan(options: &DeviceOptions, chunk: Option<usize>) -> anyhow::Result<Plan> {
    let why_not = match options.device {
        Device::Cpu => return Ok(cpu_plan(options, chunk, Vec::new())),
        Device::Auto | Device::Cuda => ctxserve_cuda::unavailable(0),
    };
    match (options.device, why_not) {
        (Device::Cuda, Some(why)) => bail!("--device cuda: {why}"),
        (_, Some(why)) => Ok(cpu_plan(options, chunk, vec![format!("no GPU is used: {why}")])),
        (_, None) => gpu_plan(Gpu::open(0).context("--device cuda")?, options, chunk),
    }
}

fn gpu_plan(gpu: Gpu, options: &DeviceOptions, chunk: Option<usize>) -> anyhow::Result<Plan> {
    let kv_dtype = match options.kv_dtype {
        KvChoice::Auto | KvChoice::Bf16 => KvDtype::Bf16,
        KvChoice::Fp8 => KvDtype::Fp8E4m3,
        KvChoice::F32 => bail!("--kv-cache-dtype float32: GPUs store keys and values as bfloat16 or fp8"),
    };
    let page_size = options.page_size.unwrap_or(64);
    if page_size < 16 {
        bail!("--block-size {page_size}: a GPU takes pages of 16 positions and more");
    }
    let mut notes = Vec::new();
    let asked = chunk.unwrap_or(GPU_CHUNK);
    if asked > GPU_MAX_CHUNK {
        notes.push(format!(
            "--max-num-batched-tokens {asked}: a GPU takes at most {GPU_MAX_CHUNK} tokens a step"
        ));
    }
    Ok(Plan {
        target: Target::Gpu(gpu),
        kv_dtype,
        page_size,
        chunk: asked.min(GPU_MAX_CHUNK),
        sequences: 256,
        notes,
    })
}

fn cpu_plan(options: &DeviceOptions, chunk: Option<usize>, mut notes: Vec<String>) -> Plan {
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
    let page_size = options.page_size.unwrap_or(16);
    Plan { target: Target::Cpu, kv_dtype, page_size, chunk: asked.min(CPU_MAX_CHUNK), sequences: 16, notes }
}

impl Target {
    /// Memory that is left beside the weights, before they are loaded.
    ///
    /// # Errors
    /// Weights and workspace that do not fit, with the numbers; a device fault.
    pub fn room(&self, info: &ModelInfo, limits: Limits, gpu_share: f64) -> anyhow::Result<Room> {
        let weights = usize::try_from(info.weight_bytes).unwrap_or(usize::MAX);
        let gpu = match self {
            Self::Cpu => {
                let free = free_bytes().map(|free| {
                    if weights > free {
                        let (weights, free) = (Bytes(weights), Bytes(free));
                        tracing::warn!("the weights take {weights} and {free} of memory are free");
                    }
                    free.saturating_sub(weights)
                });
                return Ok(Room { weights, free, ..Room::default() });
            }
            Self::Gpu(gpu) => gpu,
        };
        ctxserve_cuda::check_kv(&info.kv)?;
        let weights = usize::try_from(info.weight_bytes_on_gpu).unwrap_or(usize::MAX);
        let (facts, free) = (gpu.facts(), gpu.free_memory()?);
        let workspace = ctxserve_cuda::workspace_bytes(
            &widths(info),
            Capacity::new(limits.chunk, limits.sequences, limits.context),
            facts.multiprocessors as usize,
        );
        let share = (facts.memory as f64 * gpu_share) as usize;
        let taken = facts.memory.saturating_sub(free);
        let mine = share.saturating_sub(taken);
        let needed = weights.saturating_add(workspace).saturating_add(GPU_RESERVE);
        if needed >= mine {
            bail!(
                "{} has {} of memory, {} of them free, and may be used to {:.0} %: the weights need {}, the workspace {} and the \
                 driver {}, which leaves nothing for the KV cache; see --gpu-memory-utilization, --max-num-batched-tokens \
                 and --max-num-seqs",
                facts.name,
                Bytes(facts.memory),
                Bytes(free),
                100.0 * gpu_share,
                Bytes(weights),
                Bytes(workspace),
                Bytes(GPU_RESERVE),
            );
        }
        Ok(Room { weights, free: Some(mine - needed), workspace, reserve: GPU_RESERVE, take_all: true })
    }

    /// Bytes a second that the device's memory gives, where there is a probe for it. Takes some milliseconds.
    ///
    /// # Errors
    /// A device fault, or no memory for it.
    pub fn bandwidth(&self) -> anyhow::Result<Option<f64>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Gpu(gpu) => Ok(Some(ctxserve_cuda::probe::read_bandwidth(gpu)?)),
        }
    }

    /// Loads a checkpoint onto the device.
    ///
    /// # Errors
    /// Weights that do not fit the model, or the device.
    pub fn open(
        self,
        checkpoint: &Checkpoint,
        options: &DeviceOptions,
        load_options: LoadOptions,
        limits: Limits,
        info: &ModelInfo,
    ) -> anyhow::Result<Box<dyn Runner>> {
        let (stored, nvfp4_activations) = (checkpoint.format_name(), options.nvfp4_activations);
        if nvfp4_activations && stored != "nvfp4" {
            bail!("--activation-quant nvfp4: the weights are stored as {stored}, not as nvfp4");
        }
        let activations = if nvfp4_activations { ActivationQuant::Nvfp4 } else { ActivationQuant::None };
        match self {
            Self::Cpu => {
                let precision = if options.int8 { Precision::Int8 } else { Precision::Exact };
                let options = CpuOptions { threads: options.threads, precision, activations, isa: None };
                loaded(CpuBackend::new(options)?, checkpoint, load_options)
            }
            Self::Gpu(gpu) => {
                let cuda = CudaOptions {
                    max_rows: limits.chunk,
                    max_sequences: limits.sequences,
                    max_context: limits.context,
                    graphs: options.graphs,
                    nvfp4_activations,
                };
                if !options.self_test {
                    tracing::warn!("--skip-self-test: the GPU's kernels are not checked");
                    return loaded(CudaBackend::new(gpu, cuda)?, checkpoint, load_options);
                }
                // Beside loading, which waits for files most of the time.
                let ended = give_up_after(SELF_TEST_TIME, "the self-test of the GPU's kernels")?;
                thread::scope(|scope| {
                    let tested = scope.spawn(|| self_test(&gpu, info, checkpoint, activations));
                    let runner = CudaBackend::new(gpu.clone(), cuda)
                        .map_err(anyhow::Error::from)
                        .and_then(|backend| loaded(backend, checkpoint, load_options));
                    // First: a kernel that brings the device down fails the loading too, where it says less.
                    tested.join().map_err(|_| anyhow!("the self-test panicked"))??;
                    drop(ended);
                    runner
                })
            }
        }
    }
}

/// Ends the process unless the returned sender is dropped in time: a thread that waits for a hanging kernel cannot be
/// stopped in any other way.
fn give_up_after(time: Duration, what: &'static str) -> anyhow::Result<mpsc::Sender<()>> {
    let (sender, receiver) = mpsc::channel::<()>();
    let watch = move || {
        if receiver.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::error!("{what} has not ended after {} s: a kernel hangs", time.as_secs());
            std::process::exit(1);
        }
    };
    thread::Builder::new().name("watchdog".to_owned()).spawn(watch).context("a thread")?;
    Ok(sender)
}

/// How projections may be stored on the device.
fn dense_encodings(checkpoint: &Checkpoint) -> &'static [Encoding] {
    match checkpoint.format_name() {
        // Some may have been left out.
        "nvfp4" => &[Encoding::Nvfp4, Encoding::Bf16],
        _ => &[Encoding::Bf16],
    }
}

/// How experts are stored, as far as the first stack shows, if there is any.
fn expert_encoding(checkpoint: &Checkpoint) -> anyhow::Result<Option<Encoding>> {
    let wants = wants(checkpoint)?;
    let experts = wants.iter().find(|want| matches!(want.shape, Shape::Experts { .. }));
    Ok(match experts {
        Some(experts) => Some(checkpoint.encoding(experts)?),
        None => None,
    })
}

/// What the self-test takes from a model.
fn like(info: &ModelInfo, dense: Encoding, expert: Encoding) -> Like {
    let (costs, kv) = (&info.costs, &info.kv);
    let heads = costs.query_width / kv.head_dim.max(1);
    Like {
        head_dim: kv.head_dim,
        group: (heads / kv.kv_heads.max(1)).max(1),
        experts: costs.experts,
        top_k: costs.top_k,
        // Dense families are those that norm their heads.
        head_norms: costs.experts == 0,
        dense,
        expert,
    }
}

/// Runs the GPU's kernels once against the CPU's definitions.
///
/// # Errors
/// The first op that differs by more than its rounding allows, or a fault of the device.
fn self_test(
    gpu: &Gpu,
    info: &ModelInfo,
    checkpoint: &Checkpoint,
    activations: ActivationQuant,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut kv: Vec<KvDtype> = Vec::new();
    for dtype in info.kv.groups.iter().map(|group| group.dtype) {
        if !kv.contains(&dtype) {
            kv.push(dtype);
        }
    }
    // What is not in MXFP4 is decoded while it is loaded.
    let expert = expert_encoding(checkpoint)?.filter(|&found| found == Encoding::Mxfp4);
    let expert = expert.unwrap_or(Encoding::Bf16);
    let mut cases = 0;
    for &dense in dense_encodings(checkpoint) {
        let like = like(info, dense, expert);
        let rounds = activations == ActivationQuant::Nvfp4;
        let reference = || Ok(CpuBackend::plain_with(activations));
        let report = ctxserve_cuda::self_test(gpu, like, kv.clone(), rounds, reference)
            .with_context(|| format!("the self-test of {}", gpu.facts().name))?;
        cases += report.cases.len();
        report.failures().for_each(|case| tracing::error!("self-test: {case}"));
        if let Some(case) = report.failures().next() {
            let failed = report.failures().count();
            bail!(
                "{} computes wrong results: {failed} cases of the self-test of {}, first {case}",
                gpu.facts().name,
                report.cases.len()
            );
        }
    }
    tracing::info!("self-test: {cases} cases in {:.0} ms", 1e3 * start.elapsed().as_secs_f64());
    Ok(())
}

fn widths(info: &ModelInfo) -> Widths {
    let costs = &info.costs;
    let (inner, dense) = if costs.experts > 0 { (costs.inner, 0) } else { (0, costs.inner) };
    Widths {
        hidden: costs.hidden,
        heads: costs.query_width.div_ceil(info.kv.head_dim.max(1)),
        kv_heads: info.kv.kv_heads,
        head_dim: info.kv.head_dim,
        experts: costs.experts,
        top_k: costs.top_k,
        inner,
        dense,
        vocab: info.vocab_size,
        nvfp4: false,
        roundings: 0,
    }
}

fn loaded<B: Backend>(
    mut backend: B,
    checkpoint: &Checkpoint,
    options: LoadOptions,
) -> anyhow::Result<Box<dyn Runner>> {
    tracing::info!("device: {}", backend.describe());
    let start = Instant::now();
    let mut reported = start;
    let mut report = |at: LoadProgress| {
        if reported.elapsed() >= REPORT_EVERY {
            reported = Instant::now();
            tracing::info!("loading weights: {} of {} parts", at.done, at.total);
        }
    };
    let model = load(checkpoint, &mut backend, &options, &mut report)?;
    let bytes = usize::try_from(model.info().weight_bytes).unwrap_or(usize::MAX);
    tracing::info!("weights: {} in {:.1} s", Bytes(bytes), start.elapsed().as_secs_f64());
    Ok(Box::new(ModelRunner::new(backend, model)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(device: Device, kv_dtype: KvChoice) -> DeviceOptions {
        DeviceOptions {
            device,
            int8: false,
            nvfp4_activations: false,
            threads: None,
            kv_bytes: None,
            kv_dtype,
            page_size: None,
            gpu_share: 0.9,
            self_test: true,
            graphs: true,
        }
    }

    #[test]
    fn what_the_cpu_cannot_do_is_said() {
        let exact = plan(&options(Device::Cpu, KvChoice::Auto), None).unwrap();
        assert_eq!((exact.kv_dtype, exact.chunk, exact.page_size), (KvDtype::F32, CPU_CHUNK, 16));
        assert!(exact.notes.is_empty() && matches!(exact.target, Target::Cpu));
        let card = plan(&options(Device::Cpu, KvChoice::Fp8), Some(64_000)).unwrap();
        assert_eq!((card.kv_dtype, card.chunk, card.notes.len()), (KvDtype::Bf16, CPU_MAX_CHUNK, 2));
    }

    #[test]
    fn without_a_gpu_the_reason_is_said() {
        let Some(why) = ctxserve_cuda::unavailable(0) else { return };
        let error = plan(&options(Device::Cuda, KvChoice::Auto), None).unwrap_err().to_string();
        assert!(error.contains(&why), "{error}");
        let auto = plan(&options(Device::Auto, KvChoice::Auto), None).unwrap();
        assert!(matches!(auto.target, Target::Cpu) && auto.notes[0].contains(&why), "{auto:?}");
    }

    #[test]
    fn only_a_gpu_that_nobody_asked_for_is_given_up() {
        // Without a GPU at hand only the refusals can be built.
        let why = anyhow!("no room");
        for device in [Device::Auto, Device::Cpu, Device::Cuda] {
            let options = options(device, KvChoice::Auto);
            let plan = cpu_plan(&options, None, Vec::new());
            assert!(instead(&options, None, &plan, &why).is_none(), "{device:?}");
        }
    }
}
