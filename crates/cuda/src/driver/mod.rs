//! The device: what it is, its memory, launches, graphs.
//!
//! One context and one stream: work is ordered by issue, so memory may be reused as soon as the op that reads it is issued.

mod device;
mod graph;
mod image;
mod launch;
mod memory;
mod pinned;
mod times;
mod upload;

pub use device::{Device, Facts, unavailable};
pub use graph::{Graph, Mark};
pub use image::Kernel;
pub use launch::{Launch, Params};
pub use memory::{Buffer, Pod};
pub use pinned::Pinned;
pub use upload::Uploader;

use std::ffi::CStr;

use ctxserve_backend::DeviceError;
use cudarc::driver::sys::{CUresult, cuGetErrorString};

/// Turns a driver's answer into an error that names the op.
pub(crate) fn check(op: &'static str, result: CUresult) -> Result<(), DeviceError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or leaves null for an unknown code.
    let known =
        unsafe { cuGetErrorString(result, &raw mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    let words = if known {
        // SAFETY: a NUL-terminated string that lives as long as the driver.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        "unknown error".to_owned()
    };
    Err(DeviceError::new(op, format!("CUDA error {}: {words}", result as u32)))
}
