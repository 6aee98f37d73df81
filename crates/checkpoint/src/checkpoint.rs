//! The checkpoint as a model sees it.

use std::ops::Range;
use std::path::{Path, PathBuf};

use ctxserve_core::{Encoding, Matrix};
use serde_json::Value;

use crate::check::{self, Shape, Want};
use crate::directory;
use crate::dtype::Dtype;
use crate::error::{CheckpointError, quoted};
use crate::formats::{self, QuantFormat};
use crate::header::Entry;
use crate::json;
use crate::quantised::{self, Quantised};
use crate::source::Source;
use crate::store::Store;
use crate::values::FLOATS;

/// An opened checkpoint: configuration and headers in memory, weights where they were. Reading takes `&self`
/// and holds no lock, so threads may read different tensors at once.
#[derive(Debug)]
pub struct Checkpoint {
    dir: Option<PathBuf>,
    config: Value,
    generation_config: Option<Value>,
    store: Store,
    format: Box<dyn QuantFormat>,
    quantised: Option<Quantised>,
}

/// A tensor that never was in a file.
#[derive(Clone, Debug)]
pub struct MemoryTensor {
    /// Its stored name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub data: Vec<u8>,
}

impl Checkpoint {
    /// Opens a Hugging Face model directory: `config.json`, optionally `generation_config.json` and
    /// `hf_quant_config.json`, and `model.safetensors` or the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// Whatever configuration and headers show to be missing, malformed or unsupported. No weight is read.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::NotADirectory { path: dir.to_owned() });
        }
        let Some(config) = json::read_object(dir, "config.json")? else {
            let file = dir.join("config.json").display().to_string();
            return Err(CheckpointError::MissingFile { file, hint: String::new() });
        };
        let generation_config = json::read_object(dir, "generation_config.json")?;
        let hf_quant_config = json::read_object(dir, "hf_quant_config.json")?;
        let store = directory::open(dir)?;
        let format = formats::detect(Some(dir), &config, hf_quant_config.as_ref(), &store)?;
        Ok(Self { dir: Some(dir.to_owned()), config, generation_config, store, format, quantised: None })
    }

    /// A checkpoint without files, under the same rules.
    ///
    /// # Errors
    /// A tensor whose data does not have the size of its shape, two of one name, an unsupported
    /// `quantization_config`.
    pub fn in_memory(config: Value, tensors: Vec<MemoryTensor>) -> Result<Self, CheckpointError> {
        let mut store = Store::new("<memory>".to_owned());
        for MemoryTensor { name, dtype, shape, data } in tensors {
            let dims: Vec<u64> = shape.iter().map(|&dim| dim as u64).collect();
            let bytes = data.len();
            if dtype.bytes(&dims) != Some(bytes as u64) {
                let problem = format!("shape {shape:?} of {dtype} does not take {bytes} bytes");
                let (file, tensor) = ("<memory>".to_owned(), quoted(&name));
                return Err(CheckpointError::Tensor { file, tensor, problem });
            }
            let entry = Entry { name, dtype, shape, offset: 0, bytes };
            store.add(Source::memory(data), vec![entry])?;
        }
        let format = formats::detect(None, &config, None, &store)?;
        Ok(Self { dir: None, config, generation_config: None, store, format, quantised: None })
    }

    /// The same checkpoint, whose expert stacks are quantised to MXFP4 as they are read, to the bytes that [`crate::convert`]
    /// would write. All else is read as it is stored. `wants` is every tensor of the model.
    ///
    /// # Errors
    /// A model without experts, and experts whose inputs are not whole blocks.
    pub fn with_experts_in_mxfp4(mut self, wants: &[Want]) -> Result<Self, CheckpointError> {
        self.quantised = Some(Quantised::new(wants, self.store.total_bytes(), |want| {
            self.stored_bytes(std::slice::from_ref(want))
        })?);
        Ok(self)
    }

    /// `config.json`: an object, otherwise unchecked.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// `generation_config.json`, when there is one: an object, otherwise unchecked.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// Where it was opened.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Name of the storage format: `mxfp4`, `nvfp4` (ModelOpt's and compressed-tensors' layouts), `mlx` or `dense`.
    pub fn format_name(&self) -> &'static str {
        self.format.name()
    }

    /// Bytes of all tensors together as they are stored, or quantised while they are read.
    pub fn total_bytes(&self) -> u64 {
        self.quantised.as_ref().map_or_else(|| self.store.total_bytes(), |quantised| quantised.total_bytes)
    }

    /// Bytes that these tensors take as they are stored, or quantised while they are read.
    ///
    /// # Errors
    /// The first that is not stored so.
    pub fn stored_bytes(&self, wants: &[Want]) -> Result<u64, CheckpointError> {
        wants.iter().try_fold(0, |sum, want| {
            if let (Some(_), Shape::Experts { experts, rows, cols }) = (&self.quantised, want.shape) {
                return Ok(sum + quantised::bytes(experts, rows, cols));
            }
            let parts = check::resolve(&self.store, &*self.format, want)?;
            Ok(parts.iter().fold(sum, |sum, part| sum + part.bytes() as u64))
        })
    }

    /// How a tensor is stored, or quantised while it is read; half precision is read as float32.
    ///
    /// # Errors
    /// It is not stored as its format has it.
    pub fn encoding(&self, want: &Want) -> Result<Encoding, CheckpointError> {
        if self.quantised.is_some() && matches!(want.shape, Shape::Experts { .. }) {
            return Ok(Encoding::Mxfp4);
        }
        let parts = check::resolve(&self.store, &*self.format, want)?;
        let first = parts.first().ok_or_else(|| formats::misused(want))?;
        Ok(match first.dtype() {
            Dtype::BF16 => Encoding::Bf16,
            dtype if FLOATS.contains(&dtype) => Encoding::F32,
            _ => self.format.packed(&parts),
        })
    }

    /// The element type of the first tensor that `want` is stored in.
    pub(crate) fn stored_dtype(&self, want: &Want) -> Result<Dtype, CheckpointError> {
        let parts = check::resolve(&self.store, &*self.format, want)?;
        parts.first().map(|part| part.dtype()).ok_or_else(|| formats::misused(want))
    }

    /// Passes on what tells this checkpoint from another, or from itself after a change: files with their lengths and times,
    /// tensors with their places.
    pub(crate) fn describe_files(&self, line: &mut dyn FnMut(&str)) -> Result<(), CheckpointError> {
        self.store.describe(line)
    }

    /// The bytes of `tokenizer.json`; `None` when there is none, or no directory.
    ///
    /// # Errors
    /// When it cannot be read or is absurdly large.
    pub fn tokenizer_json(&self) -> Result<Option<Vec<u8>>, CheckpointError> {
        match &self.dir {
            Some(dir) => json::read_small(&dir.join("tokenizer.json"), json::MAX_TOKENIZER),
            None => Ok(None),
        }
    }

    /// Whether a tensor is stored under exactly this name.
    pub fn contains(&self, stored_name: &str) -> bool {
        self.store.get(stored_name).is_some()
    }

    /// Checks, from headers alone, that exactly the wanted tensors are stored with usable types and shapes.
    ///
    /// # Errors
    /// [`CheckpointError::Mismatch`] with everything that is missing, mis-typed, mis-shaped or not wanted.
    pub fn check(&self, wants: &[Want]) -> Result<(), CheckpointError> {
        check::check(&self.store, &*self.format, wants)
    }

    /// Reads a vector `[len]`, or the rows of a `[n, len / n]` tensor one after another.
    ///
    /// # Errors
    /// When it is not stored so, cannot be read, or has an element that is not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let want = Want { name: name.to_owned(), shape: Shape::Vector { len } };
        let parts = check::resolve(&self.store, &*self.format, &want)?;
        self.format.vector(&want, &parts)
    }

    /// Reads a matrix `[rows, cols]` = `[out, in]` in its stored precision: packed where it is quantised, and F16 as F32.
    ///
    /// # Errors
    /// When it is not stored so, cannot be read, or has an element, scale or factor that is not usable.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, CheckpointError> {
        self.rows(&Want { name: name.to_owned(), shape: Shape::Matrix { rows, cols } }, 0..rows)
    }

    /// Reads an expert stack as one matrix `[experts * rows, cols]`, each expert `[out, in]` however it is
    /// stored; packed where it is quantised.
    ///
    /// # Errors
    /// When it is not stored so, cannot be read, or has an element, scale or factor that is not usable.
    pub fn experts(
        &self,
        name: &str,
        experts: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix, CheckpointError> {
        let want = Want { name: name.to_owned(), shape: Shape::Experts { experts, rows, cols } };
        self.rows(&want, 0..experts)
    }

    /// Reads a part of a matrix or of an expert stack: `range` is rows of the one and whole experts of the other. Only
    /// that part is held in memory.
    ///
    /// # Errors
    /// When it is not stored so, `range` leaves it, it cannot be read, or has an element, scale or factor that is not
    /// usable.
    pub fn rows(&self, want: &Want, range: Range<usize>) -> Result<Matrix, CheckpointError> {
        if self.quantised.is_some() && matches!(want.shape, Shape::Experts { .. }) {
            return quantised::read(want, range, |expert| self.stored_rows(want, expert));
        }
        self.stored_rows(want, range)
    }

    /// The same as it is stored.
    fn stored_rows(&self, want: &Want, range: Range<usize>) -> Result<Matrix, CheckpointError> {
        let (units, height, cols) = match want.shape {
            Shape::Matrix { rows, cols } => (rows, 1, cols),
            Shape::Experts { experts, rows, cols } => (experts, rows, cols),
            Shape::Vector { .. } => return Err(formats::misused(want)),
        };
        let parts = check::resolve(&self.store, &*self.format, want)?;
        // An overflow is possible where the other dimension is zero, and only there.
        let Some(end) = range.end.checked_mul(height).filter(|_| range.end <= units) else {
            return Err(formats::misused(want));
        };
        let rows = range.start.saturating_mul(height).min(end)..end;
        let count = rows.len();
        let elements = self.format.load(&self.store, want, &parts, rows)?;
        Matrix::new(count, cols, elements).ok_or_else(|| formats::misused(want))
    }
}
