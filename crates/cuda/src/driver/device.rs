//! Opening a device.

use std::ffi::{CStr, c_int};
use std::sync::Arc;

use ctxserve_backend::DeviceError;
use cudarc::driver::sys;

use super::check;
use super::image::Images;
use super::times::Times;

/// Oldest driver interface that takes the embedded machine code: CUDA 13.0 (driver 580).
const OLDEST_DRIVER: c_int = 13_000;
/// Oldest generation with kernels: Ampere.
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The vendor's name for it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory that one thread block may ask for.
    pub shared_memory: u32,
    /// Bytes of device memory.
    pub memory: usize,
    /// The driver's interface, as `1000 * major + 10 * minor`.
    pub driver: i32,
}

impl Facts {
    /// Whether the kernels written for Hopper's own instructions (wgmma, bulk copies) run on it.
    pub fn is_hopper(&self) -> bool {
        self.capability == (9, 0)
    }
}

/// A device with its context and its one stream. Clones share both.
#[derive(Clone, Debug)]
pub struct Device {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) facts: Facts,
    ordinal: c_int,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    pub(super) images: Images,
    pub(super) times: Times,
}

// SAFETY: context and stream are handles that the driver lets any thread use once the context is current in it,
// which `Device::enter` sees to.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Inner {}

/// Why no CUDA device can be used, or `None` if `ordinal` can. Loads the driver, takes no memory.
pub fn unavailable(ordinal: u32) -> Option<String> {
    probe(ordinal).err()
}

fn probe(ordinal: u32) -> Result<(c_int, Facts), String> {
    if super::image::FATBINS.is_empty() {
        return Err(format!("this build has no CUDA kernels ({})", super::image::WHY_NONE));
    }
    // SAFETY: looks for the library without calling into it.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver was found (libcuda.so.1)".to_owned());
    }
    let ask = |what, result| check(what, result).map_err(|error| error.to_string());
    let mut driver = 0;
    // SAFETY: the version may be asked before initialisation.
    ask("driver version", unsafe { sys::cuDriverGetVersion(&raw mut driver) })?;
    if driver < OLDEST_DRIVER {
        let (major, minor) = (driver / 1000, driver % 1000 / 10);
        return Err(format!(
            "the NVIDIA driver supports CUDA {major}.{minor}; this build needs 13.0 (driver 580 or newer)"
        ));
    }
    // SAFETY: must come first; repeated calls do nothing.
    ask("initialisation", unsafe { sys::cuInit(0) })?;
    let mut count = 0;
    // SAFETY: writes one integer.
    ask("device count", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    let wanted = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    if wanted >= count {
        return Err(format!("there is no CUDA device {ordinal}: {count} found"));
    }
    let mut device = 0;
    // SAFETY: the ordinal is below the count.
    ask("device", unsafe { sys::cuDeviceGet(&raw mut device, wanted) })?;
    let mut name = [0; 256];
    // SAFETY: writes at most 256 bytes, NUL included.
    ask("device name", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 256, device) })?;
    // SAFETY: NUL-terminated by the driver.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let attribute = |which| {
        let mut value = 0;
        // SAFETY: writes one integer.
        ask("device attribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
        Ok::<_, String>(u32::try_from(value).unwrap_or_default())
    };
    use sys::CUdevice_attribute as Attribute;
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if capability < OLDEST_CAPABILITY {
        let (major, minor) = capability;
        return Err(format!("{name} has compute capability {major}.{minor}; there are kernels from 8.0 on"));
    }
    let mut memory = 0;
    // SAFETY: writes one size.
    ask("device memory", unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) })?;
    let facts = Facts {
        name,
        capability,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory,
        driver,
    };
    Ok((device, facts))
}

impl Device {
    /// Opens a device and loads the kernels for it.
    ///
    /// # Errors
    /// The reason of [`unavailable`], or whatever the driver says.
    pub fn open(ordinal: u32) -> Result<Self, DeviceError> {
        const OP: &str = "open device";
        let (device, facts) = probe(ordinal).map_err(|what| DeviceError::new(OP, what))?;
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: `device` exists; the context is released in `Drop`.
        check(OP, unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) })?;
        // SAFETY: a context that was just retained.
        check(OP, unsafe { sys::cuCtxSetCurrent(context) })?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: destroyed in `Drop`.
        check(OP, unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
        let (images, times) = (Images::default(), Times::default());
        Ok(Self { inner: Arc::new(Inner { facts, ordinal: device, context, stream, images, times }) })
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    /// Makes the context current in this thread. Cheap; every entry into the driver starts with it.
    pub(super) fn enter(&self, op: &'static str) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as `inner`.
        check(op, unsafe { sys::cuCtxSetCurrent(self.inner.context) })
    }

    /// Waits until everything issued so far has finished.
    ///
    /// # Errors
    /// A fault of any earlier op.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter("synchronize")?;
        // SAFETY: a live stream.
        check("synchronize", unsafe { sys::cuStreamSynchronize(self.inner.stream) })
    }

    /// Bytes of device memory that are free now.
    ///
    /// # Errors
    /// A device fault.
    pub fn free_memory(&self) -> Result<usize, DeviceError> {
        self.enter("free memory")?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        check("free memory", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok(free)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: nothing uses the stream or the context any more; errors at the end of a process are of no use.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.ordinal);
        }
    }
}
