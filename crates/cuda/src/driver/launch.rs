//! Launching kernels.

use std::ffi::c_void;

use ctxserve_backend::DeviceError;
use cudarc::driver::sys;

use super::{Device, Kernel, check};

/// The one argument of a kernel: a `#[repr(C)]` struct of device addresses and numbers, as the kernel declares it.
///
/// # Safety
/// The layout must be that of the kernel's parameter.
pub unsafe trait Params: Copy + 'static {}

/// Shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Thread blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Whether it may start before the launch before it has ended (programmatic dependent launch, compute capability 9.0
    /// and newer). The kernel must then wait (`pdl_wait`) before it reads what an earlier one wrote or writes what an
    /// earlier one reads.
    pub overlap: bool,
}

impl Device {
    /// Issues a kernel on the stream, or records it while a graph is captured.
    ///
    /// # Errors
    /// A launch that the device refuses, or an earlier fault.
    ///
    /// # Safety
    /// The addresses in `params` must be those of live device memory, large enough for what the kernel does with this grid.
    pub unsafe fn launch<P: Params>(
        &self,
        kernel: &Kernel,
        launch: &Launch,
        params: &P,
    ) -> Result<(), DeviceError> {
        self.enter(kernel.name)?;
        use sys::CUlaunchAttributeID as Id;
        // SAFETY: plain data for which zeros are valid.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let overlap = launch.overlap && self.facts().capability >= (9, 0);
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.inner.stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(overlap),
        };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies config and parameter before it returns; the rest is the caller's promise.
        check(kernel.name, unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })?;
        self.note_launch(kernel.name)
    }
}
