//! What the backend claims, and the check of it that a server runs before it is ready.

use ctxserve_backend::conformance::{Claims, Like, Report, quick};
use ctxserve_backend::{Backend, DeviceError, KvDtype};
use ctxserve_core::Encoding;

use crate::driver::Device;
use crate::{CudaBackend, CudaOptions};

/// Always the same, so that a device which is right never fails by bad luck.
const SEED: u64 = 20_261_122;

/// How exact the kernels are, on devices of any generation.
pub fn claims(kv: Vec<KvDtype>) -> Claims {
    Claims {
        exact: 5e-6,
        // Weights, activations and queries are rounded to bf16.
        products: 1.5e-2,
        bitwise: false,
        kv,
        experts: vec![Encoding::Mxfp4, Encoding::Bf16, Encoding::Nvfp4],
        page_sizes: vec![16, 32, 64, 128],
        lacks: Vec::new(),
    }
}

/// The same of kernels that round activations to NVFP4, against definitions that do. Attention and SwiGLU leave bf16, which now and then
/// is rounded to another code than the definition's float32 is: in a row of 48 inputs the largest of them alone are 12 % of its size.
pub fn rounding_claims(kv: Vec<KvDtype>) -> Claims {
    // Nobody rounds what experts multiply.
    let experts = vec![Encoding::Mxfp4, Encoding::Bf16];
    Claims { products: 0.2, experts, ..claims(kv) }
}

/// Runs every kernel that serves a model of this kind, over few rows and many, on a small layer of its own, against backends from
/// `reference`. `kv` has the storages in use; with `nvfp4_activations` both sides round inputs of NVFP4 matrices. Takes some tens of megabytes of device memory while it runs; another thread may
/// use the device meanwhile.
///
/// # Errors
/// A device fault; a disagreement is in the [`Report`].
pub fn self_test<R: Backend>(
    device: &Device,
    like: Like,
    kv: Vec<KvDtype>,
    nvfp4_activations: bool,
    reference: impl Fn() -> Result<R, DeviceError>,
) -> Result<Report, DeviceError> {
    let rounds = nvfp4_activations && like.dense == Encoding::Nvfp4;
    let claims = if rounds { rounding_claims(kv) } else { claims(kv) };
    let options =
        CudaOptions { max_rows: 512, max_sequences: 512, max_context: 256, graphs: false, nvfp4_activations };
    quick(SEED, &claims, like, || CudaBackend::new(device.clone(), options), reference)
}
