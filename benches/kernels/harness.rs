//! Timing: launches captured into a graph that walks through several sets of inputs, so that no set stays in L2; median of several
//! replays by device events.

use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::Device;

/// Measured ceilings of one H200: a read-only stream, and dense bf16 products.
const BYTES_PER_SECOND: f64 = 4.61e12;
const FLOPS_PER_SECOND: f64 = 790e12;
const REPLAYS: usize = 15;

pub(crate) struct Bench {
    pub(crate) device: Device,
    filter: String,
    seed: std::cell::Cell<u64>,
}

/// What a case must move and compute, at the least.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) bytes: f64,
    pub(crate) flops: f64,
}

impl Bench {
    pub(crate) fn new(device: Device, filter: String) -> Result<Self, DeviceError> {
        let facts = device.facts();
        println!("{} (driver {}), {} multiprocessors", facts.name, facts.driver, facts.multiprocessors);
        println!("{:48} {:>10} {:>10} {:>10} {:>9}", "case", "us", "GB/s", "TFLOP/s", "roofline");
        Ok(Self { device, filter, seed: std::cell::Cell::new(1) })
    }

    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Random bits.
    pub(crate) fn bits(&self) -> u64 {
        self.seed.set(self.seed.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        let z = self.seed.get();
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub(crate) fn unit(&self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    /// Times `launches` calls of `issue(i)` and prints one line. Returns microseconds a call.
    pub(crate) fn time(
        &self,
        name: &str,
        work: Work,
        launches: usize,
        mut issue: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> Result<f64, DeviceError> {
        let graph = self.device.capture(|| (0..launches).try_for_each(&mut issue))?;
        graph.launch()?;
        self.device.synchronize()?;
        let mut times = Vec::with_capacity(REPLAYS);
        for _ in 0..REPLAYS {
            let before = self.device.mark()?;
            graph.launch()?;
            times.push(f64::from(self.device.mark()?.since(&before)?) * 1e3 / launches as f64);
        }
        times.sort_by(f64::total_cmp);
        let us = times[REPLAYS / 2];
        let floor = (work.bytes / BYTES_PER_SECOND).max(work.flops / FLOPS_PER_SECOND) * 1e6;
        println!(
            "{name:48} {us:10.2} {:10.0} {:10.1} {:8.1}%",
            work.bytes / us * 1e-3,
            work.flops / us * 1e-6,
            100.0 * floor / us
        );
        Ok(us)
    }
}
