//! Large copies to the device: several threads fill page-locked pieces while earlier pieces are on their way.
//!
//! The driver stages pageable memory with one thread, which is several times slower than the link to the device.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use ctxserve_backend::DeviceError;

use super::{Buffer, Device, Mark, Pinned, Pod};

/// Most threads that copy.
const THREADS: usize = 4;
/// Pieces of each: one is filled while the device reads the other.
const SLOTS: usize = 2;
/// Bytes of a piece: long against the latency of a copy, short enough to stay in a processor's cache.
const PIECE: usize = 4 << 20;

/// Copies memory of any kind to a device, ordered with the ops of the stream. Holds `4 * 2 * 4` MiB of page-locked memory.
#[derive(Debug)]
pub struct Uploader {
    device: Device,
    /// One per thread.
    lanes: Vec<Lane>,
}

/// The staging memory of one thread.
#[derive(Debug)]
struct Lane {
    slots: [Slot; SLOTS],
    next: usize,
}

#[derive(Debug)]
struct Slot {
    memory: Pinned<u8>,
    /// Behind the copy that last read it.
    mark: Option<Mark>,
}

/// One copy, shared by its threads.
struct Job<'a> {
    bytes: &'a [u8],
    to: &'a Buffer<u8>,
    /// The next piece that nobody has.
    next: AtomicUsize,
    failed: AtomicBool,
    error: Mutex<Option<DeviceError>>,
}

impl Uploader {
    /// Takes its page-locked memory.
    ///
    /// # Errors
    /// No memory left to lock.
    pub fn new(device: &Device) -> Result<Self, DeviceError> {
        let threads = thread::available_parallelism().map_or(1, |count| count.get().min(THREADS));
        let slot = || Ok(Slot { memory: device.pinned(PIECE)?, mark: None });
        let lane = |_| Ok(Lane { slots: [slot()?, slot()?], next: 0 });
        Ok(Self {
            device: device.clone(),
            lanes: (0..threads).map(lane).collect::<Result<_, DeviceError>>()?,
        })
    }

    /// Copies `values` to elements `at..` of `to`, ordered with the ops of the stream. Returns when `values` may be reused;
    /// the device may still be reading what was staged.
    ///
    /// # Errors
    /// More values than fit, or a device fault.
    pub fn write<T: Pod>(&mut self, to: &mut Buffer<T>, at: usize, values: &[T]) -> Result<(), DeviceError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // SAFETY: the view ends with this call, in which `to` stays borrowed.
        let view = unsafe { to.view(at.saturating_mul(size_of::<T>()), bytes.len())? };
        let job = Job {
            bytes,
            to: &view,
            next: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            error: Mutex::new(None),
        };
        let pieces = bytes.len().div_ceil(PIECE);
        let Some((own, others)) = self.lanes.split_first_mut() else {
            return Err(DeviceError::new("upload", "no staging memory"));
        };
        thread::scope(|scope| {
            for lane in others.iter_mut().take(pieces.saturating_sub(1)) {
                // A thread that the system refuses is one that does not help.
                let _ =
                    thread::Builder::new().name("upload".to_owned()).spawn_scoped(scope, || job.run(lane));
            }
            job.run(own);
        });
        job.error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Takes device memory and copies `values` to it.
    ///
    /// # Errors
    /// Out of memory, or a device fault.
    pub fn upload<T: Pod>(&mut self, values: &[T]) -> Result<Buffer<T>, DeviceError> {
        let mut buffer = self.device.allocate(values.len())?;
        self.write(&mut buffer, 0, values)?;
        Ok(buffer)
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // The device may still be reading. A fault has been or will be reported by whatever waits for the results.
        let _ = self.device.synchronize();
    }
}

impl Job<'_> {
    /// Takes pieces until there are none or one has failed.
    fn run(&self, lane: &mut Lane) {
        while !self.failed.load(Ordering::Relaxed) {
            let piece = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(bytes) = self.bytes.chunks(PIECE).nth(piece) else { return };
            if let Err(error) = lane.send(self.to, piece * PIECE, bytes) {
                self.failed.store(true, Ordering::Relaxed);
                self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    }
}

impl Lane {
    /// Copies `bytes`, no more than a piece, to byte `at` of `to`.
    fn send(&mut self, to: &Buffer<u8>, at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        if let Some(mark) = &slot.mark {
            mark.wait()?;
        }
        slot.memory[..bytes.len()].copy_from_slice(bytes);
        to.issue_pinned(at, &slot.memory, bytes.len())?;
        match &slot.mark {
            Some(mark) => mark.again(),
            None => {
                slot.mark = Some(to.device().mark()?);
                Ok(())
            }
        }
    }
}
