//! What will fit on this machine.

use ctxserve_backend::KvDtype;
use ctxserve_checkpoint::Checkpoint;
use ctxserve_engine::Bytes;
use serde::Serialize;

use super::{described, spelled};
use crate::cli::options::ServeOptions;
use crate::cli::values::Values;
use crate::device::{self, Limits, Plan, Target};
use crate::memory::bytes_of_one;

/// What a device could hold beside the weights, as `serve` would use it without flags.
#[derive(Debug, Default, Serialize)]
pub(super) struct Fit {
    device: String,
    /// Why nothing fits.
    problem: Option<String>,
    /// Why it is not another device.
    notes: Vec<String>,
    /// One for each way to store keys and values.
    room: Vec<Room>,
}

#[derive(Debug, Serialize)]
struct Room {
    kv_dtype: &'static str,
    /// Bytes for the KV cache; null where the system does not say what is free.
    bytes: Option<usize>,
    /// Longest sequence, alone.
    longest: Option<usize>,
    /// Sequences of full context at once.
    sequences: Option<usize>,
}

impl Fit {
    pub(super) fn find(checkpoint: &Checkpoint) -> Self {
        let mut fit = Self::default();
        "none".clone_into(&mut fit.device);
        if let Err(error) = fit.choose(checkpoint) {
            fit.problem = Some(format!("{error:#}"));
        }
        fit
    }

    /// Takes the device that `serve` would take.
    fn choose(&mut self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        let options = ServeOptions::new(&Values::default(), |_| None)?;
        let mut plan = device::plan(&options.device, None)?;
        loop {
            self.notes.append(&mut plan.notes);
            let why = match self.fill(checkpoint, &options, &plan) {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            plan = device::instead(&options.device, None, &plan, &why).ok_or(why)?;
        }
    }

    fn fill(&mut self, checkpoint: &Checkpoint, options: &ServeOptions, plan: &Plan) -> anyhow::Result<()> {
        let dtypes = match &plan.target {
            Target::Cpu => [KvDtype::F32, KvDtype::Bf16],
            Target::Gpu(_) => [KvDtype::Bf16, KvDtype::Fp8E4m3],
        };
        self.device = match &plan.target {
            Target::Cpu => "CPU".to_owned(),
            Target::Gpu(gpu) => gpu.facts().name.clone(),
        };
        self.room.clear();
        for dtype in dtypes {
            let info = described(checkpoint, plan.page_size, dtype)?;
            let limits = Limits { chunk: plan.chunk, sequences: plan.sequences, context: info.max_context };
            let bytes = plan.target.room(&info, limits, options.device.gpu_share)?.free;
            if bytes == Some(0) {
                anyhow::bail!("the weights do not fit into the memory that is free");
            }
            let needs = |length| bytes_of_one(&info.kv, length, plan.chunk);
            let longest = bytes.map(|bytes| {
                let (mut fits, mut over) = (0, info.max_context + 1);
                while over - fits > 1 {
                    let middle = fits + (over - fits) / 2;
                    if needs(middle) <= bytes { fits = middle } else { over = middle }
                }
                fits
            });
            let sequences = bytes.map(|bytes| bytes / needs(info.max_context).max(1));
            self.room.push(Room { kv_dtype: spelled(dtype), bytes, longest, sequences });
        }
        Ok(())
    }

    pub(super) fn lines(&self) -> Vec<String> {
        let notes = self.notes.iter().cloned();
        if let Some(problem) = &self.problem {
            return notes.chain([format!("not on {}: {problem}", self.device)]).collect();
        }
        let of = |room: &Room| match (room.bytes, room.longest, room.sequences) {
            (Some(bytes), Some(longest), Some(sequences)) => format!(
                "on {}: {} for {} keys and values, {}",
                self.device,
                Bytes(bytes),
                room.kv_dtype,
                match sequences {
                    0 => format!("a sequence of {longest} tokens"),
                    1 => "one sequence of full context".to_owned(),
                    many => format!("{many} sequences of full context"),
                }
            ),
            _ => format!("on {}: the system does not say how much memory is free", self.device),
        };
        notes.chain(self.room.iter().map(of)).collect()
    }
}
