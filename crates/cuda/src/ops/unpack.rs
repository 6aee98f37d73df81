//! A step's description, from pinned host memory into its arrays.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params, Pinned};

/// Most parts of a description.
pub const PARTS: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    from: u64,
    to: u64,
    count: i32,
    at: [i32; PARTS],
    len: [i32; PARTS],
}

// SAFETY: mirrors `Params` of kernels/unpack.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct Unpack {
    kernel: Kernel,
}

impl Unpack {
    /// Loads the kernel.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { kernel: device.kernel("unpack", "unpack", 0)? })
    }

    /// Issues it: each `(at, len)` of `parts` takes the next `len` words of `from` to word `at` of `to`. `from` stays as it is
    /// until the stream has passed.
    ///
    /// # Errors
    /// Parts beyond either side, or a device fault.
    pub fn issue(
        &self,
        device: &Device,
        from: &Pinned<u32>,
        to: &Buffer<u32>,
        parts: &[(usize, usize)],
    ) -> Result<(), DeviceError> {
        let words: usize = parts.iter().map(|part| part.1).sum();
        let inside = parts.iter().all(|&(at, len)| at.checked_add(len).is_some_and(|end| end <= to.len()));
        if parts.len() > PARTS || words > from.len() || !inside {
            return Err(DeviceError::new(
                "unpack",
                format!("{} parts of {words} words do not fit", parts.len()),
            ));
        }
        let (mut at, mut len) = ([0; PARTS], [0; PARTS]);
        for (part, &(start, words)) in parts.iter().enumerate() {
            (at[part], len[part]) = (start as i32, words as i32);
        }
        let arguments =
            Arguments { from: from.address(), to: to.address(), count: parts.len() as i32, at, len };
        let blocks = words.div_ceil(1024).clamp(1, 64) as u32;
        let launch = Launch { grid: [blocks, 1, 1], block: 256, shared: 0, overlap: false };
        // SAFETY: every part was checked to lie inside both sides.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
