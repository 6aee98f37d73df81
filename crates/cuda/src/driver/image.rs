//! Embedded kernels and their handles.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

use ctxserve_backend::DeviceError;
use cudarc::driver::sys;

use super::{Device, check};

/// File stems of `kernels/*.cu` and their fatbins.
pub(super) static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Why there are none.
pub(super) const WHY_NONE: &str = match option_env!("CTXSERVE_NO_KERNELS") {
    Some(why) => why,
    None => "none were embedded",
};

/// Modules loaded so far. They stay until the process ends, as the context does.
#[derive(Debug, Default)]
pub(super) struct Images {
    modules: Mutex<HashMap<&'static str, Module>>,
}

#[derive(Clone, Copy, Debug)]
struct Module(sys::CUmodule);

// SAFETY: a handle that any thread may use.
unsafe impl Send for Module {}

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub(super) function: sys::CUfunction,
    pub(super) name: &'static str,
}

// SAFETY: a handle that any thread may use; modules are never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Device {
    /// The kernel `function` of `kernels/FILE.cu`, allowed `shared` bytes of dynamic shared memory. The name is also what
    /// errors call it.
    ///
    /// # Errors
    /// No such file or function, no code for this device, or more shared memory than it has.
    pub fn kernel(
        &self,
        file: &'static str,
        function: &'static str,
        shared: usize,
    ) -> Result<Kernel, DeviceError> {
        let fail = |what: String| DeviceError::new(function, what);
        self.enter(function)?;
        let mut modules = self.inner.images.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(file) {
            Some(module) => *module,
            None => {
                let Some((_, image)) = FATBINS.iter().find(|(name, _)| *name == file) else {
                    return Err(fail(format!("this build has no kernels/{file}.cu")));
                };
                let mut module = std::ptr::null_mut();
                // SAFETY: a complete fatbin, which the driver copies.
                check(function, unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) })?;
                *modules.entry(file).or_insert(Module(module))
            }
        };
        let name = CString::new(function).map_err(|error| fail(error.to_string()))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a live module and a NUL-terminated name.
        check(function, unsafe { sys::cuModuleGetFunction(&raw mut handle, module.0, name.as_ptr()) })?;
        let limit = self.facts().shared_memory as usize;
        if shared > limit {
            return Err(fail(format!("{shared} bytes of shared memory are wanted, the device has {limit}")));
        }
        use sys::CUfunction_attribute as Attribute;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(shared).unwrap_or(i32::MAX);
        // SAFETY: a live function.
        check(function, unsafe { sys::cuFuncSetAttribute(handle, attribute, bytes) })?;
        Ok(Kernel { function: handle, name: function })
    }
}
