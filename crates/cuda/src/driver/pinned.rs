//! Host memory that the device copies from and to without staging.

use std::ops::{Deref, DerefMut};

use ctxserve_backend::DeviceError;
use cudarc::driver::sys;

use super::{Device, Pod, check};

/// Page-locked host memory. Whoever issues a copy keeps it, unchanged, until the stream has passed the copy.
#[derive(Debug)]
pub struct Pinned<T> {
    pointer: *mut T,
    len: usize,
    device: Device,
}

// SAFETY: plain memory with one owner.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: shared references only read.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl Device {
    /// Takes `len` zeroed elements of page-locked host memory.
    ///
    /// # Errors
    /// No memory left to lock.
    pub fn pinned<T: Pod>(&self, len: usize) -> Result<Pinned<T>, DeviceError> {
        const OP: &str = "lock host memory";
        self.enter(OP)?;
        let bytes = len.max(1).saturating_mul(size_of::<T>().max(1));
        let mut pointer = std::ptr::null_mut();
        // SAFETY: freed in `Drop`.
        check(OP, unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) })?;
        // SAFETY: that many bytes were just allocated, page-aligned.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { pointer: pointer.cast(), len, device: self.clone() })
    }
}

impl<T> Pinned<T> {
    /// Where kernels read it: under unified addressing the host's own address.
    pub fn address(&self) -> u64 {
        self.pointer as u64
    }
}

impl<T> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements, owned by `self`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }
}

impl<T> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: `len` initialised elements, owned by `self`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.device.enter("unlock host memory").is_ok() {
            // SAFETY: allocated here, freed once.
            let _ = unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
        }
    }
}
