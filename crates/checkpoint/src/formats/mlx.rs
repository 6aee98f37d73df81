//! What mlx-lm writes: quantised modules as `weight` U32 with `scales`, experts of gpt-oss split into gate, up and down.
//!
//! | mode | `weight` | `scales` | `biases` |
//! |---|---|---|---|
//! | affine | U32 `[.., in * bits / 32]` | float `[.., in / group]` | float, as many: offsets |
//! | mxfp4 | U32 `[.., in / 8]` | U8 E8M0 `[.., in / 32]` | none |
//!
//! A word holds its codes from the lowest bit on, so in a little-endian file its bytes are those of [`Elements::Affine`] and
//! [`Elements::Mxfp4`]. Embedding, head and router may be quantised too. A module is quantised where its `scales` are; the
//! configuration has a section for all and may have one for a module, which replaces it. `bias` beside `biases` is the bias
//! of the layer.
//!
//! `experts.gate_proj` and `experts.up_proj` are the even and the odd rows of the stack `experts.gate_up_proj`.

use std::collections::HashMap;
use std::ops::Range;

use ctxserve_core::{Elements, Encoding, MXFP4_BLOCK};
use serde_json::Value;

use super::declared::{Declared, text};
use super::mxfp4::e8m0_scales;
use super::{QuantFormat, Row, load_plain, misused, module, plain};
use crate::check::{Extent, Part, Shape, Want};
use crate::dtype::Dtype;
use crate::error::{CheckpointError, quoted};
use crate::store::{Store, Stored};
use crate::values::{self, FLOATS};
use crate::{bytes, interleave};

const NAME: &str = "mlx";

pub(super) const ROW: Row = Row {
    name: NAME,
    claims: |method| matches!(method, Some("mlx affine" | "mlx mxfp4")),
    open: |declared| Ok(Box::new(Mlx::open(declared.ok_or("declares no quantization")?)?)),
};

/// The two halves of a fused stack, even rows first.
const HALVES: [&str; 2] = ["gate_proj", "up_proj"];
const FUSED: &str = "gate_up_proj";

/// How a module is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Affine { bits: usize, group: usize },
    Mxfp4,
}

#[derive(Debug)]
struct Mlx {
    scheme: Scheme,
    /// Modules with a section of their own; `None` is not quantised.
    modules: HashMap<String, Option<Scheme>>,
}

impl Mlx {
    fn open(declared: &Declared<'_>) -> Result<Self, String> {
        let section = declared.sections.first().ok_or("quantization is empty")?;
        let mut modules = HashMap::new();
        for (key, value) in section.as_object().into_iter().flatten() {
            let scheme = match value {
                Value::Object(_) => Some(
                    Scheme::read(value).map_err(|what| format!("quantization of {}: {what}", quoted(key)))?,
                ),
                Value::Bool(false) => None,
                _ => continue,
            };
            modules.insert(key.clone(), scheme);
        }
        Ok(Self { scheme: Scheme::read(section).map_err(|what| format!("quantization: {what}"))?, modules })
    }

    /// How the module at `path` is stored; `None` is in floats.
    fn scheme(&self, store: &Store, path: &str) -> Option<Scheme> {
        store.get(&scales(path))?;
        self.modules.get(path).copied().unwrap_or(Some(self.scheme))
    }

    /// The parts of the module at `path` of this logical shape.
    fn module_parts(&self, store: &Store, path: &str, shape: &[usize]) -> Result<Vec<Part>, String> {
        let Some(scheme) = self.scheme(store, path) else {
            return Ok(vec![part(path, "weight", FLOATS, shape.to_vec())]);
        };
        let (&cols, outer) = shape.split_last().ok_or("no dimensions")?;
        let group = scheme.group();
        if !cols.is_multiple_of(group) {
            return Err(format!("{cols} input features are not a multiple of {group}"));
        }
        let with = |inner: usize| [outer, &[inner]].concat();
        // A group is a multiple of eight, so words are whole.
        let words = part(path, "weight", &[Dtype::U32], with(cols / 8 * scheme.bits() / 4));
        Ok(match scheme {
            Scheme::Affine { .. } => vec![
                words,
                part(path, "scales", FLOATS, with(cols / group)),
                part(path, "biases", FLOATS, with(cols / group)),
            ],
            Scheme::Mxfp4 => vec![words, part(path, "scales", &[Dtype::U8], with(cols / group))],
        })
    }

    /// Reads `rows` of the module at `path` from its parts.
    fn load_module(
        &self,
        store: &Store,
        path: &str,
        cols: usize,
        parts: &[Stored<'_>],
        rows: Range<usize>,
    ) -> Result<Option<Elements>, CheckpointError> {
        Ok(match (self.scheme(store, path), parts) {
            (None, [tensor]) => Some(values::elements(*tensor, rows.start * cols..rows.end * cols)?),
            (Some(Scheme::Mxfp4), [weight, scales]) => {
                let scales = e8m0_scales(*scales, &rows, cols)?;
                let codes = bytes::codes(*weight, rows.start * cols / 2..rows.end * cols / 2)?;
                Some(Elements::Mxfp4 { codes, scales })
            }
            (Some(Scheme::Affine { bits, group }), [weight, scales, offsets]) => {
                let groups = cols / group;
                let range = rows.start * groups..rows.end * groups;
                let scales = values::f32s(*scales, range.clone())?;
                let offsets = values::f32s(*offsets, range)?;
                let row = cols / 8 * bits;
                let codes = bytes::codes(*weight, rows.start * row..rows.end * row)?;
                Some(Elements::Affine { bits, group, codes, scales, offsets })
            }
            _ => None,
        })
    }
}

impl Scheme {
    /// Reads a section; its sizes must be ones that a matrix can have.
    fn read(section: &Value) -> Result<Self, String> {
        let number = |key: &str| match section.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().map(usize::try_from) {
                Some(Ok(number)) => Ok(Some(number)),
                _ => Err(format!("{key} is {value}")),
            },
        };
        let (bits, group) = (number("bits")?, number("group_size")?);
        match text(section, "mode")?.unwrap_or("affine") {
            "affine" => match (bits.unwrap_or(4), group.unwrap_or(64)) {
                (bits @ (4 | 8), group) if group > 0 && group.is_multiple_of(8) => {
                    Ok(Self::Affine { bits, group })
                }
                (bits, group) => Err(format!(
                    "{bits} bits in groups of {group} are not supported: 4 or 8, in groups of a multiple of 8"
                )),
            },
            "mxfp4" => match (bits.unwrap_or(4), group.unwrap_or(MXFP4_BLOCK)) {
                (4, MXFP4_BLOCK) => Ok(Self::Mxfp4),
                (bits, group) => {
                    Err(format!("mxfp4 has 4 bits in groups of 32, not {bits} in groups of {group}"))
                }
            },
            other => Err(format!("mode {} is not supported", quoted(other))),
        }
    }

    fn bits(self) -> usize {
        match self {
            Self::Affine { bits, .. } => bits,
            Self::Mxfp4 => 4,
        }
    }

    fn group(self) -> usize {
        match self {
            Self::Affine { group, .. } => group,
            Self::Mxfp4 => MXFP4_BLOCK,
        }
    }
}

fn scales(path: &str) -> String {
    format!("{path}.scales")
}

fn part(path: &str, leaf: &str, dtypes: &'static [Dtype], shape: Vec<usize>) -> Part {
    Part { name: format!("{path}.{leaf}"), dtypes, extent: Extent::Exact(shape) }
}

/// The modules of an expert stack, or of its bias without the `_bias`: two where it is fused.
fn expert_modules(stack: &str) -> Vec<String> {
    match stack.strip_suffix(FUSED) {
        Some(layer) if layer.ends_with('.') => HALVES.map(|half| format!("{layer}{half}")).to_vec(),
        _ => vec![stack.to_owned()],
    }
}

/// The expert stack that a vector is the bias of.
fn biased_stack(want: &Want) -> Option<&str> {
    want.name.strip_suffix("_bias").filter(|stack| stack.contains(".experts."))
}

impl QuantFormat for Mlx {
    fn name(&self) -> &'static str {
        NAME
    }

    fn verify(&self, store: &Store) -> Result<(), CheckpointError> {
        let mut any = false;
        for tensor in store.iter() {
            let Some(path) = tensor.name().strip_suffix(".scales") else { continue };
            any = true;
            if self.modules.get(path) == Some(&None) {
                let problem = "is there, but config.json says that this module is not quantised";
                return Err(tensor.error(problem.to_owned()));
            }
        }
        let lacking = |path: &&String| store.get(&scales(path)).is_none();
        // Sorted, so that the message does not depend on the map.
        let mut listed: Vec<&String> = self.modules.iter().filter_map(|(k, v)| v.map(|_| k)).collect();
        listed.sort();
        if let Some(path) = listed.into_iter().find(lacking) {
            let problem = "is missing, and config.json says how this module is quantised".to_owned();
            let (file, tensor) = (store.label.clone(), quoted(&scales(path)));
            return Err(CheckpointError::Tensor { file, tensor, problem });
        }
        if any {
            return Ok(());
        }
        let problem =
            "config.json declares a quantization by MLX, but no tensor here is named *.scales".to_owned();
        Err(CheckpointError::File { file: store.label.clone(), problem })
    }

    fn parts(&self, store: &Store, want: &Want) -> Result<Vec<Part>, String> {
        match (want.shape, module(want)) {
            (Shape::Matrix { rows, cols }, Some(path)) => self.module_parts(store, path, &[rows, cols]),
            (Shape::Experts { experts, rows, cols }, _) => {
                let modules = expert_modules(&want.name);
                if !rows.is_multiple_of(modules.len()) {
                    return Err(format!("{rows} rows of gate and up are odd"));
                }
                let shape = [experts, rows / modules.len(), cols];
                if let [gate, up] = modules.as_slice()
                    && self.scheme(store, gate) != self.scheme(store, up)
                {
                    return Err(format!("{} and {} are quantised differently", HALVES[0], HALVES[1]));
                }
                let parts = modules.iter().map(|path| self.module_parts(store, path, &shape));
                Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
            }
            (Shape::Vector { len }, _) => {
                let Some(stack) = biased_stack(want) else { return Ok(vec![plain(want)]) };
                let modules = expert_modules(stack);
                if !len.is_multiple_of(modules.len()) {
                    return Err(format!("{len} biases of gate and up are odd"));
                }
                let extent = Extent::Flat(len / modules.len());
                let part =
                    |path| Part { name: format!("{path}.bias"), dtypes: FLOATS, extent: extent.clone() };
                Ok(modules.into_iter().map(part).collect())
            }
            (Shape::Matrix { .. }, None) => Ok(vec![plain(want)]),
        }
    }

    fn packed(&self, parts: &[Stored<'_>]) -> Encoding {
        // Offsets: only affine codes have them.
        let affine = parts.iter().any(|part| part.name().ends_with(".biases"));
        if affine { Encoding::Affine } else { Encoding::Mxfp4 }
    }

    fn load(
        &self,
        store: &Store,
        want: &Want,
        parts: &[Stored<'_>],
        rows: Range<usize>,
    ) -> Result<Elements, CheckpointError> {
        let loaded = match (want.shape, module(want)) {
            (Shape::Matrix { cols, .. }, Some(path)) => self.load_module(store, path, cols, parts, rows)?,
            (Shape::Experts { cols, .. }, _) => match expert_modules(&want.name).as_slice() {
                [gate, up] => {
                    // Whole experts, and an even number of rows in each.
                    let rows = rows.start / 2..rows.end / 2;
                    let (even, odd) = parts.split_at(parts.len() / 2);
                    let even = self.load_module(store, gate, cols, even, rows.clone())?;
                    let odd = self.load_module(store, up, cols, odd, rows.clone())?;
                    even.zip(odd).and_then(|(even, odd)| interleave::rows(&even, &odd, rows.len()))
                }
                [path] => self.load_module(store, path, cols, parts, rows)?,
                _ => None,
            },
            _ => Some(load_plain(want, parts, rows)?),
        };
        loaded.ok_or_else(|| misused(want))
    }

    fn vector(&self, want: &Want, parts: &[Stored<'_>]) -> Result<Vec<f32>, CheckpointError> {
        match parts {
            [tensor] => values::vector(*tensor),
            [gate, up] => {
                let (gate, up) = (values::vector(*gate)?, values::vector(*up)?);
                Ok(gate.into_iter().zip(up).flat_map(|(gate, up)| [gate, up]).collect())
            }
            _ => Err(misused(want)),
        }
    }
}
