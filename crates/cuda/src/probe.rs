//! What the device's memory gives, measured.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Launch, Params};

const OP: &str = "probe_read";
const THREADS: u32 = 512;
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;
/// Bytes that a block reads at a time; the kernel reads whole tiles.
const TILE: usize = 65_536;
/// Far beyond any cache.
const MOST: usize = 4 << 30;
const LEAST: usize = 256 << 20;
const PASSES: usize = 5;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    data: u64,
    sink: u64,
    words: u64,
}

// SAFETY: mirrors `Params` of kernels/probe.cu.
unsafe impl Params for Arguments {}

/// Bytes per second that one kernel reads from device memory: the median of five passes over up to 4 GiB, half of what is free at most.
///
/// # Errors
/// Less than 512 MiB of free memory, or a device fault.
pub fn read_bandwidth(device: &Device) -> Result<f64, DeviceError> {
    let bytes = (device.free_memory()? / 2).min(MOST) / TILE * TILE;
    if bytes < LEAST {
        return Err(DeviceError::new(OP, format!("only {bytes} bytes of device memory to read")));
    }
    let kernel = device.kernel("probe", "probe_read", 0)?;
    let fill = device.kernel("probe", "probe_fill", 0)?;
    let data: Buffer<u8> = device.allocate(bytes)?;
    let sink: Buffer<u8> = device.zeros(THREADS as usize * 16)?;
    let arguments = Arguments { data: data.address(), sink: sink.address(), words: (bytes / 16) as u64 };
    let blocks = device.facts().multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
    let launch = Launch { grid: [blocks, 1, 1], block: THREADS, shared: 0, overlap: false };
    // SAFETY: as below; it writes to `data` alone.
    unsafe { device.launch(&fill, &launch, &arguments) }?;
    let mut seconds = Vec::with_capacity(PASSES);
    // The first pass loads the code and fills the translation caches.
    for pass in 0..=PASSES {
        let before = device.mark()?;
        // SAFETY: `data` has that many words, `sink` one for each thread.
        unsafe { device.launch(&kernel, &launch, &arguments) }?;
        let milliseconds = device.mark()?.since(&before)?;
        if pass > 0 {
            seconds.push(f64::from(milliseconds) * 1e-3);
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(bytes as f64 / seconds[PASSES / 2])
}
