//! Files of converted weights, a piece of a tensor at a time.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use ctxserve_core::{Elements, Encoding, Matrix, Nvfp4Run};
use half::bf16;

use super::blocks::{Error, Packed, amax};
use super::plan::{Item, Plan, Rule, Shard};
use super::{ConvertProgress, TensorReport, mxfp4, nvfp4};
use crate::check::{Shape, Want};
use crate::checkpoint::Checkpoint;
use crate::decode::to_f32;
use crate::error::{CheckpointError, quoted};
use crate::transpose;
use crate::writer::SafetensorsWriter;

/// Elements of a matrix that are held at once. An expert is held whole.
const PIECE: usize = 1 << 24;

/// The factor of inputs that nobody measured.
const UNCALIBRATED: f32 = 1.0;

/// What the matrices of a group have in common.
#[derive(Clone, Copy)]
enum Factor {
    /// All are stored so already, with this `weight_scale_2`: codes and scales are kept.
    Kept(f32),
    /// `weight_scale_2` of all.
    New(f32),
}

/// Converts the tensors of a plan.
pub(super) struct Writer<'a> {
    source: &'a Checkpoint,
    groups: &'a [Vec<Want>],
    /// The largest input of each group, where it is known.
    inputs: &'a [Option<f32>],
    factors: HashMap<usize, Factor>,
    progress: &'a mut dyn FnMut(ConvertProgress<'_>),
    done: u64,
    total: u64,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        source: &'a Checkpoint,
        plan: &'a Plan,
        inputs: &'a [Option<f32>],
        progress: &'a mut dyn FnMut(ConvertProgress<'_>),
    ) -> Result<Self, CheckpointError> {
        let shards = plan.shards.iter().map(|shard| stored_bytes(source, shard));
        let total = shards.sum::<Result<u64, _>>()?;
        Ok(Self { source, groups: &plan.groups, inputs, factors: HashMap::new(), progress, done: 0, total })
    }

    /// Counts a file that an earlier run has finished.
    pub(super) fn skip(&mut self, shard: &Shard) -> Result<(), CheckpointError> {
        let bytes = stored_bytes(self.source, shard)?;
        self.reach(self.done + bytes, "");
        Ok(())
    }

    /// Writes one file into `dir`.
    pub(super) fn shard(&mut self, shard: &Shard, dir: &Path) -> Result<Vec<TensorReport>, CheckpointError> {
        let specs: Vec<_> = shard.items.iter().flat_map(|item| item.specs.clone()).collect();
        let mut file = SafetensorsWriter::create(&dir.join(&shard.file), &specs, &[("format", "pt")])?;
        let mut reports = Vec::with_capacity(shard.items.len());
        for item in &shard.items {
            let mut passage = Passage { item, file: &mut file, input: None, error: Error::default() };
            reports.push(self.item(&mut passage)?);
        }
        file.finish()?;
        Ok(reports)
    }

    fn item(&mut self, passage: &mut Passage<'_>) -> Result<TensorReport, CheckpointError> {
        let Item { want, rule, .. } = passage.item;
        let bytes = self.source.stored_bytes(std::slice::from_ref(want))?;
        let end = self.done + bytes;
        let mut from = self.source.stored_dtype(want)?.to_string().to_ascii_lowercase();
        let elements = match want.shape {
            Shape::Vector { len } => {
                passage.vector(&self.source.vector(&want.name, len)?)?;
                len
            }
            Shape::Matrix { rows: units, cols: size } | Shape::Experts { experts: units, cols: size, .. } => {
                let (factor, input) = match *rule {
                    Rule::Nvfp4(group) => {
                        (Some(self.factor(group)?), self.inputs.get(group).copied().flatten())
                    }
                    _ => (None, None),
                };
                passage.input = input.map(nvfp4::factor);
                let mut elements = 0;
                for range in pieces(want, units, size) {
                    let matrix = self.source.rows(want, range.clone())?;
                    if let Encoding::Mxfp4 | Encoding::Nvfp4 | Encoding::Affine = matrix.encoding() {
                        from = format!("{:?}", matrix.encoding()).to_ascii_lowercase();
                    }
                    elements += matrix.rows() * matrix.cols();
                    passage.piece(matrix, factor, range.start == 0)?;
                    let left = (units - range.end) as u128 * u128::from(bytes) / units as u128;
                    self.reach(end - left as u64, &want.name);
                }
                elements
            }
        };
        self.reach(end, &want.name);
        let to = match rule {
            Rule::Floats | Rule::Turned => "bf16",
            Rule::Mxfp4 => "mxfp4",
            Rule::Nvfp4(_) => "nvfp4",
        };
        Ok(TensorReport {
            name: want.name.clone(),
            from,
            to: to.to_owned(),
            elements: elements as u64,
            relative_error: passage.error.relative(),
        })
    }

    /// The factor of a group, found when the first of it is written.
    fn factor(&mut self, group: usize) -> Result<Factor, CheckpointError> {
        if let Some(&factor) = self.factors.get(&group) {
            return Ok(factor);
        }
        let (mut most, mut stored) = (0.0_f32, Vec::new());
        for want in self.groups.get(group).into_iter().flatten() {
            let Shape::Matrix { rows, cols } = want.shape else { continue };
            for range in pieces(want, rows, cols) {
                let matrix = self.source.rows(want, range)?;
                stored.push(run(&matrix).map(|run| run.weight));
                most = most.max(amax(&to_f32(&matrix)));
            }
        }
        // Factors that differ would not be those of one product.
        let factor = match stored.first() {
            Some(&Some(weight)) if stored.iter().all(|&other| other == Some(weight)) => Factor::Kept(weight),
            _ => Factor::New(nvfp4::factor(most)),
        };
        self.factors.insert(group, factor);
        Ok(factor)
    }

    fn reach(&mut self, done: u64, tensor: &str) {
        self.done = done;
        (self.progress)(ConvertProgress { done, total: self.total, tensor });
    }
}

/// One tensor on its way into a file, and what it has lost so far.
struct Passage<'a> {
    item: &'a Item,
    file: &'a mut SafetensorsWriter,
    /// The factor of its inputs, where they were measured.
    input: Option<f32>,
    error: Error,
}

impl Passage<'_> {
    /// Writes one piece: some rows, or one expert.
    fn piece(&mut self, matrix: Matrix, factor: Option<Factor>, first: bool) -> Result<(), CheckpointError> {
        match (self.item.rule, factor) {
            (Rule::Mxfp4, _) if matrix.encoding() == Encoding::Mxfp4 => self.packed(kept(matrix)),
            (Rule::Mxfp4, _) => self.packed(mxfp4::encode(&to_f32(&matrix))),
            (Rule::Nvfp4(_), Some(factor)) => {
                if first {
                    let (Factor::Kept(weight) | Factor::New(weight)) = factor;
                    let stored = || run(&matrix).and_then(|run| run.input);
                    let input = self.input.or_else(stored).unwrap_or(UNCALIBRATED);
                    self.write(2, &weight.to_le_bytes())?;
                    self.write(3, &input.to_le_bytes())?;
                }
                match factor {
                    Factor::Kept(_) => self.packed(kept(matrix)),
                    Factor::New(weight) => self.packed(nvfp4::encode(&to_f32(&matrix), weight)),
                }
            }
            _ => {
                let (rows, cols) = (matrix.rows(), matrix.cols());
                let narrow = match matrix.into_elements() {
                    Elements::Bf16(values) => values,
                    elements => {
                        let matrix = Matrix::new(rows, cols, elements);
                        self.narrow(&matrix.as_ref().map(to_f32).unwrap_or_default())?
                    }
                };
                if self.item.rule == Rule::Turned {
                    self.write(0, bytemuck::cast_slice(&transpose::turned(&narrow, rows, cols)))
                } else {
                    self.write(0, bytemuck::cast_slice(&narrow))
                }
            }
        }
    }

    fn vector(&mut self, values: &[f32]) -> Result<(), CheckpointError> {
        let narrow = self.narrow(values)?;
        self.write(0, bytemuck::cast_slice(&narrow))
    }

    /// In bfloat16, each of which must be finite.
    fn narrow(&mut self, values: &[f32]) -> Result<Vec<bf16>, CheckpointError> {
        let narrow: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
        if let Some((_, value)) = narrow.iter().zip(values).find(|(narrow, _)| !narrow.is_finite()) {
            let problem = format!("{value} is beyond what bfloat16 can hold");
            let (file, tensor) = ("<source>".to_owned(), quoted(&self.item.want.name));
            return Err(CheckpointError::Tensor { file, tensor, problem });
        }
        let pairs = values.iter().zip(&narrow).map(|(&was, is)| (f64::from(was), is.to_f64()));
        self.error = self.error + Error::of(pairs);
        Ok(narrow)
    }

    fn packed(&mut self, packed: Packed) -> Result<(), CheckpointError> {
        self.error = self.error + packed.error;
        self.write(0, &packed.codes)?;
        self.write(1, &packed.scales)
    }

    /// Appends to one of the item's stored tensors.
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), CheckpointError> {
        let name = self.item.specs.get(at).map_or("", |spec| spec.name.as_str());
        self.file.write(name, bytes)
    }
}

/// Rows or experts of a tensor that are held at once.
fn pieces(want: &Want, units: usize, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let step = match want.shape {
        Shape::Matrix { .. } => PIECE.checked_div(cols).unwrap_or(units).max(1),
        Shape::Experts { .. } | Shape::Vector { .. } => 1,
    };
    (0..units).step_by(step).map(move |first| first..units.min(first.saturating_add(step)))
}

/// The factors of an NVFP4 matrix, which the reader gives in one run.
fn run(matrix: &Matrix) -> Option<Nvfp4Run> {
    match matrix.elements() {
        Elements::Nvfp4 { runs, .. } => runs.first().copied(),
        _ => None,
    }
}

/// Codes and scales as they are.
fn kept(matrix: Matrix) -> Packed {
    let (codes, scales) = match matrix.into_elements() {
        Elements::Mxfp4 { codes, scales } | Elements::Nvfp4 { codes, scales, .. } => (codes, scales),
        _ => Default::default(),
    };
    Packed { codes, scales, error: Error::default() }
}

fn stored_bytes(source: &Checkpoint, shard: &Shard) -> Result<u64, CheckpointError> {
    shard.items.iter().map(|item| source.stored_bytes(std::slice::from_ref(&item.want))).sum()
}
