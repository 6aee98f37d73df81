//! Safetensors and quantised checkpoint formats, validated before a byte is trusted.
//!
//! [`Checkpoint::open`] reads headers only and refuses what they can show to be wrong; weights are read
//! later, one logical tensor at a time, by positioned reads into memory that the caller then owns. Names,
//! shapes, offsets, lengths and configuration files are all untrusted input: no size is allocated before it
//! was compared with the length of the file that states it.
//!
//! Logical tensors carry Hugging Face names and shapes in `[out, in]` order; how they are stored is known to
//! one file per format under `formats/` and to nothing else.

mod bytes;
mod check;
mod checkpoint;
mod convert;
mod decode;
mod directory;
mod dtype;
mod error;
mod formats;
mod header;
mod interleave;
mod json;
mod parallel;
mod quantised;
mod source;
mod store;
mod transpose;
mod values;
mod writer;

#[cfg(target_endian = "big")]
compile_error!("safetensors data is little-endian and is read in place: big-endian hosts are not supported");

pub use check::{Shape, Want};
pub use checkpoint::{Checkpoint, MemoryTensor};
pub use convert::{Conversion, ConvertProgress, ConvertReport, Target, TensorReport, convert};
pub use decode::to_bf16;
pub use dtype::Dtype;
pub use error::{CheckpointError, Flaw, Problem};
pub use writer::{SafetensorsWriter, TensorSpec};
