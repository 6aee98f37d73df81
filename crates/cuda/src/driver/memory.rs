//! Device memory.

use std::ffi::c_void;
use std::marker::PhantomData;

use ctxserve_backend::DeviceError;
use cudarc::driver::sys;

use super::{Device, Pinned, check};

/// What may be copied to and from a device as bytes.
pub use bytemuck::Pod;

/// `len` elements of device memory, freed on drop unless it is a view. Contents are undefined until written.
#[derive(Debug)]
pub struct Buffer<T> {
    address: sys::CUdeviceptr,
    len: usize,
    owned: bool,
    device: Device,
    element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// Its address on the device, 256-byte aligned.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The address of element `at`.
    ///
    /// # Errors
    /// `at` beyond the end.
    pub fn at(&self, op: &'static str, at: usize) -> Result<u64, DeviceError> {
        if at > self.len {
            return Err(DeviceError::new(op, format!("element {at} of {}", self.len)));
        }
        Ok(self.address + (at * size_of::<T>()) as u64)
    }

    /// Copies `values` to elements `at..`, ordered with the ops of the stream. Returns when `values` may be reused.
    ///
    /// # Errors
    /// More values than fit, or a device fault.
    pub fn write(&mut self, at: usize, values: &[T]) -> Result<(), DeviceError> {
        const OP: &str = "upload";
        self.inside(OP, at, values.len())?;
        self.device.enter(OP)?;
        let (to, bytes) = (self.address + (at * size_of::<T>()) as u64, size_of_val(values));
        // SAFETY: both sides are that long; pageable memory is staged before the call returns.
        check(OP, unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, values.as_ptr().cast::<c_void>(), bytes, self.device.inner.stream)
        })
    }

    /// Issues a copy of the first `len` elements of `from` to elements `at..`. `from` must not be changed before the
    /// stream has passed the copy.
    ///
    /// # Errors
    /// Lengths that do not fit, or a device fault.
    pub fn write_pinned(&mut self, at: usize, from: &Pinned<T>, len: usize) -> Result<(), DeviceError> {
        self.issue_pinned(at, from, len)
    }

    /// [`Self::write_pinned`] for threads that write disjoint elements of one buffer at once.
    pub(super) fn issue_pinned(&self, at: usize, from: &Pinned<T>, len: usize) -> Result<(), DeviceError> {
        const OP: &str = "upload";
        self.inside(OP, at, len)?;
        if len > from.len() {
            return Err(DeviceError::new(OP, format!("{len} elements of {}", from.len())));
        }
        self.device.enter(OP)?;
        let to = self.address + (at * size_of::<T>()) as u64;
        // SAFETY: both sides are that long; `Pinned` outlives the copy by its contract.
        check(OP, unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                to,
                from.as_ptr().cast(),
                len * size_of::<T>(),
                self.device.inner.stream,
            )
        })
    }

    /// Where it is.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Issues a copy of elements `at..at + len` into the start of `to`, which holds them once the stream has passed it.
    ///
    /// # Errors
    /// Lengths that do not fit, or a device fault.
    pub fn read_pinned(&self, at: usize, to: &mut Pinned<T>, len: usize) -> Result<(), DeviceError> {
        const OP: &str = "download";
        self.inside(OP, at, len)?;
        if len > to.len() {
            return Err(DeviceError::new(OP, format!("{len} elements into {}", to.len())));
        }
        self.device.enter(OP)?;
        let from = self.address + (at * size_of::<T>()) as u64;
        // SAFETY: both sides are that long.
        check(OP, unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                to.as_mut_ptr().cast(),
                from,
                len * size_of::<T>(),
                self.device.inner.stream,
            )
        })
    }

    /// Waits for the stream and copies elements `at..at + len` to the host.
    ///
    /// # Errors
    /// A range beyond the end, or a device fault.
    pub fn read(&self, at: usize, len: usize) -> Result<Vec<T>, DeviceError> {
        const OP: &str = "download";
        self.inside(OP, at, len)?;
        let mut values = vec![T::zeroed(); len];
        self.device.enter(OP)?;
        let from = self.address + (at * size_of::<T>()) as u64;
        // SAFETY: both sides are that long; the stream is awaited before `values` is looked at.
        check(OP, unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                values.as_mut_ptr().cast(),
                from,
                len * size_of::<T>(),
                self.device.inner.stream,
            )
        })?;
        self.device.synchronize()?;
        Ok(values)
    }

    /// Sets every byte, ordered with the ops of the stream.
    ///
    /// # Errors
    /// A device fault.
    pub fn fill(&mut self, byte: u8) -> Result<(), DeviceError> {
        self.device.enter("fill")?;
        // SAFETY: the buffer is that long.
        check("fill", unsafe {
            sys::cuMemsetD8Async(self.address, byte, self.bytes(), self.device.inner.stream)
        })
    }

    /// `len` elements of type `U` from byte `offset` on, as a buffer of its own that owns nothing.
    ///
    /// # Errors
    /// A range beyond the end, or one that `U` cannot be aligned at.
    ///
    /// # Safety
    /// The view must not outlive this buffer.
    pub unsafe fn view<U: Pod>(&self, offset: usize, len: usize) -> Result<Buffer<U>, DeviceError> {
        let end = len.checked_mul(size_of::<U>()).and_then(|bytes| bytes.checked_add(offset));
        if end.is_none_or(|end| end > self.bytes()) || !offset.is_multiple_of(align_of::<U>().max(1)) {
            return Err(DeviceError::new(
                "view",
                format!("{len} elements at byte {offset} of {}", self.bytes()),
            ));
        }
        let (address, device) = (self.address + offset as u64, self.device.clone());
        Ok(Buffer { address, len, owned: false, device, element: PhantomData })
    }

    fn inside(&self, op: &'static str, at: usize, len: usize) -> Result<(), DeviceError> {
        if at.checked_add(len).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        Err(DeviceError::new(op, format!("elements {at}..{at}+{len} of {}", self.len)))
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.owned && self.address != 0 && self.device.enter("free").is_ok() {
            // SAFETY: allocated here, freed once. The driver waits for work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

impl Device {
    /// Takes memory for `len` elements; undefined contents.
    ///
    /// # Errors
    /// Out of memory, with the size that was wanted.
    pub fn allocate<T: Pod>(&self, len: usize) -> Result<Buffer<T>, DeviceError> {
        const OP: &str = "allocate";
        let Some(bytes) = len.checked_mul(size_of::<T>()) else {
            return Err(DeviceError::new(OP, format!("{len} elements overflow the address space")));
        };
        self.enter(OP)?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: freed in `Drop`.
            check(OP, unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) }).map_err(|error| {
                let free =
                    self.free_memory().map_or_else(|_| "an unknown number".to_owned(), |n| n.to_string());
                DeviceError::new(
                    OP,
                    format!("{bytes} bytes of device memory, {free} are free: {}", error.what),
                )
            })?;
        }
        Ok(Buffer { address, len, owned: true, device: self.clone(), element: PhantomData })
    }

    /// Takes memory and copies `values` to it.
    ///
    /// # Errors
    /// Out of memory, or a device fault.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>, DeviceError> {
        let mut buffer = self.allocate(values.len())?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Takes memory of zeros.
    ///
    /// # Errors
    /// Out of memory, or a device fault.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>, DeviceError> {
        let mut buffer = self.allocate(len)?;
        if len > 0 {
            buffer.fill(0)?;
        }
        Ok(buffer)
    }
}
