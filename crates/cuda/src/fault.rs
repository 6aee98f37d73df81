//! Faults on purpose, for tests of how a server ends: only in builds with the feature `fault-injection`, and there only where
//! `CTXSERVE_INJECT` asks for one.

use ctxserve_backend::{Batch, DeviceError};

use crate::driver::{Buffer, Device, Launch, Params};

const OP: &str = "fault";
/// Names the fault: `memory`, `page:N` or `trap:N`, where steps count from 1.
const VARIABLE: &str = "CTXSERVE_INJECT";

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    unused: u64,
}

// SAFETY: mirrors `Params` of kernels/fault.cu.
unsafe impl Params for Arguments {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The KV cache takes more than the device has.
    Memory,
    /// A page beyond its pool, in the batch of this step.
    Page(u64),
    /// A kernel that traps, before this step.
    Trap(u64),
}

/// The fault of this process, and the steps so far.
#[derive(Debug)]
pub(crate) struct Faults {
    fault: Option<Fault>,
    step: u64,
}

fn parse(text: &str) -> Option<Fault> {
    let (kind, step) = text.split_once(':').unwrap_or((text, ""));
    match (kind, step.parse()) {
        ("memory", _) if step.is_empty() => Some(Fault::Memory),
        ("page", Ok(step)) => Some(Fault::Page(step)),
        ("trap", Ok(step)) => Some(Fault::Trap(step)),
        _ => None,
    }
}

impl Faults {
    /// Reads the environment.
    ///
    /// # Errors
    /// A fault that there is not.
    pub(crate) fn new() -> Result<Self, DeviceError> {
        let Ok(text) = std::env::var(VARIABLE) else { return Ok(Self { fault: None, step: 0 }) };
        let fault = parse(&text).ok_or_else(|| {
            DeviceError::new(OP, format!("{VARIABLE}={text:?}: expected memory, page:N or trap:N"))
        })?;
        tracing::warn!("{VARIABLE}={text}: this process will fail on purpose");
        Ok(Self { fault: Some(fault), step: 0 })
    }

    /// Before the KV cache is allocated.
    pub(crate) fn allocation(&self, device: &Device) -> Result<(), DeviceError> {
        if self.fault != Some(Fault::Memory) {
            return Ok(());
        }
        let _too_much: Buffer<u8> = device.allocate(device.facts().memory.saturating_add(1 << 30))?;
        Ok(())
    }

    /// At the start of each step.
    pub(crate) fn step(&mut self, device: &Device) -> Result<(), DeviceError> {
        self.step += 1;
        if self.fault != Some(Fault::Trap(self.step)) {
            return Ok(());
        }
        let kernel = device.kernel("fault", "fault_trap", 0)?;
        let launch = Launch { grid: [1, 1, 1], block: 32, shared: 0, overlap: false };
        // SAFETY: the kernel touches no memory.
        unsafe { device.launch(&kernel, &launch, &Arguments { unused: 0 }) }
    }

    /// The batch of the step, with a page that does not exist if it is that one's turn.
    pub(crate) fn batch(&self, batch: &Batch) -> Batch {
        let mut batch = batch.clone();
        if self.fault == Some(Fault::Page(self.step))
            && let Some(slice) = batch.sequences.first_mut()
        {
            let mut tables = slice.tables.as_ref().clone();
            tables.iter_mut().flat_map(|table| &mut table.pages).for_each(|page| *page = u32::MAX);
            slice.tables = tables.into();
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_named() {
        assert_eq!(parse("memory"), Some(Fault::Memory));
        assert_eq!(parse("page:3"), Some(Fault::Page(3)));
        assert_eq!(parse("trap:40"), Some(Fault::Trap(40)));
        for wrong in ["", "trap", "trap:", "page:x", "memory:3", "fire:1"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
