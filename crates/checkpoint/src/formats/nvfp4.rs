//! NVFP4 as ModelOpt and as compressed-tensors store it.
//!
//! | | ModelOpt | compressed-tensors | |
//! |---|---|---|---|
//! | codes | `weight` | `weight_packed` | U8 `[out, in/2]`, low nibble first |
//! | scales | `weight_scale` | `weight_scale` | E4M3 `[out, in/16]`, row-major |
//! | factor of the weights | `weight_scale_2` | 1 / `weight_global_scale` | F32, one |
//! | factor of the inputs | `input_scale` | 1 / `input_global_scale` | F32, one; absent where only weights were quantised |
//!
//! A matrix is quantised where its scales are; others are floats.

use std::ops::Range;

use ctxserve_core::{Elements, Encoding, NVFP4_BLOCK, Nvfp4Run, e4m3};
use serde_json::Value;

use super::declared::{Declared, object};
use super::excluded::Excluded;
use super::{Opened, QuantFormat, Row, load_plain, misused, module, plain};
use crate::bytes;
use crate::check::{Extent, Part, Shape, Want};
use crate::dtype::Dtype;
use crate::error::CheckpointError;
use crate::store::{Store, Stored};
use crate::values;

const NAME: &str = "nvfp4";

pub(super) const MODELOPT: Row = Row {
    name: NAME,
    claims: |method| method.is_some_and(|method| method.eq_ignore_ascii_case("modelopt NVFP4")),
    open: |declared| open(&MODELOPT_NAMES, declared),
};

pub(super) const COMPRESSED_TENSORS: Row = Row {
    name: NAME,
    claims: |method| method == Some("compressed-tensors nvfp4-pack-quantized"),
    open: |declared| open(&COMPRESSED_NAMES, declared),
};

/// What the tensors of a quantised module are called.
#[derive(Debug)]
struct Names {
    /// For messages.
    tool: &'static str,
    /// Keys of the configuration's lists of modules left as floats.
    excluded: &'static [&'static str],
    codes: &'static str,
    scales: &'static str,
    /// Factor of the weights, then that of the inputs.
    factors: [&'static str; 2],
    /// Whether factors are stored as their reciprocals.
    reciprocal: bool,
}

static MODELOPT_NAMES: Names = Names {
    tool: "modelopt",
    excluded: &["ignore", "exclude_modules"],
    codes: "weight",
    scales: "weight_scale",
    factors: ["weight_scale_2", "input_scale"],
    reciprocal: false,
};

static COMPRESSED_NAMES: Names = Names {
    tool: "compressed-tensors",
    excluded: &["ignore"],
    codes: "weight_packed",
    scales: "weight_scale",
    factors: ["weight_global_scale", "input_global_scale"],
    reciprocal: true,
};

#[derive(Debug)]
struct Nvfp4 {
    names: &'static Names,
    excluded: Excluded,
    /// Whether the configuration says that every other linear module is quantised.
    all_others: bool,
}

fn open(names: &'static Names, declared: Option<&Declared<'_>>) -> Opened {
    let declared = declared.ok_or("declares no quantization")?;
    let mut all_others = true;
    for section in &declared.sections {
        check_numbers(section)?;
        for (name, group) in
            object(section, "config_groups")?.and_then(Value::as_object).into_iter().flatten()
        {
            let targets = group.get("targets").and_then(Value::as_array);
            all_others &= targets.is_none_or(|targets| targets.iter().all(|target| target == "Linear"));
            for side in ["weights", "input_activations"] {
                if let Some(numbers) = object(group, side)? {
                    check_numbers(numbers).map_err(|what| format!("config_groups.{name}.{side}: {what}"))?;
                }
            }
        }
    }
    let sparse = |section: &Value| section.get("format").is_none_or(|format| format != "dense");
    let transformed = declared.get("transform_config").is_some_and(says_something);
    if transformed || declared.get("sparsity_config").is_some_and(|it| says_something(it) && sparse(it)) {
        let key = if transformed { "transform_config" } else { "sparsity_config" };
        return Err(format!("{key} is not supported"));
    }
    let list = names.excluded.iter().find_map(|key| Some((key, declared.get(key)?)));
    let excluded = list.map(|(key, list)| Excluded::read(key, list)).transpose()?;
    Ok(Box::new(Nvfp4 {
        names,
        all_others: all_others && excluded.is_some(),
        excluded: excluded.unwrap_or_default(),
    }))
}

/// What NVFP4 is, where the configuration repeats it.
fn check_numbers(section: &Value) -> Result<(), String> {
    for (key, wanted) in [("group_size", NVFP4_BLOCK as u64), ("num_bits", 4)] {
        if let Some(found) = section.get(key).filter(|value| !value.is_null())
            && found.as_u64() != Some(wanted)
        {
            return Err(format!("{key} is {found}, and NVFP4 has {wanted}"));
        }
    }
    match section.get("type") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(kind)) if kind == "float" => Ok(()),
        Some(found) => Err(format!("type is {found}, and NVFP4 is float")),
    }
}

/// Whether an optional section holds more than empty ones.
fn says_something(section: &Value) -> bool {
    match section {
        Value::Object(fields) => fields.values().any(says_something),
        Value::Array(list) => !list.is_empty(),
        Value::Null => false,
        _ => true,
    }
}

impl Names {
    fn of(module: &str, leaf: &str) -> String {
        format!("{module}.{leaf}")
    }

    /// Whether any tensor says that the module is quantised: then those that lack are missing.
    fn quantised(&self, store: &Store, module: &str) -> bool {
        [self.scales, self.factors[0]].iter().any(|leaf| store.get(&Self::of(module, leaf)).is_some())
    }

    /// Reads a factor, which must be a positive number.
    fn factor(&self, tensor: Stored<'_>) -> Result<f32, CheckpointError> {
        let stored = values::vector(tensor)?.first().copied().unwrap_or(0.0);
        let factor = if self.reciprocal { 1.0 / stored } else { stored };
        if stored > 0.0 && factor > 0.0 && factor.is_finite() {
            return Ok(factor);
        }
        Err(tensor.error(format!("is {stored}, and a factor must be positive and finite")))
    }
}

impl QuantFormat for Nvfp4 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn verify(&self, store: &Store) -> Result<(), CheckpointError> {
        let Names { tool, codes, scales, factors, .. } = *self.names;
        let mut any = false;
        for tensor in store.iter() {
            let Some((module, leaf)) = tensor.name().rsplit_once('.') else { continue };
            let says_quantised = leaf == scales || leaf == factors[0];
            any |= says_quantised;
            if says_quantised && self.excluded.names(module) {
                let problem = "is there, but the configuration says that this module is not quantised";
                return Err(tensor.error(problem.to_owned()));
            }
            let is_linear = leaf == "weight" && tensor.shape().len() == 2 && !is_embedding(module);
            if self.all_others
                && is_linear
                && !self.names.quantised(store, module)
                && !self.excluded.may_mean(module)
            {
                let problem = format!("has no {scales} beside it, but the configuration does not exclude it");
                return Err(tensor.error(problem));
            }
        }
        if any {
            return Ok(());
        }
        let problem = format!(
            "the configuration declares {tool} NVFP4, but no tensor here is named *.{scales} beside *.{codes}"
        );
        Err(CheckpointError::File { file: store.label.clone(), problem })
    }

    fn parts(&self, store: &Store, want: &Want) -> Result<Vec<Part>, String> {
        let (Some(module), Shape::Matrix { rows, cols }) = (module(want), want.shape) else {
            return Ok(vec![plain(want)]);
        };
        if !self.names.quantised(store, module) {
            return Ok(vec![plain(want)]);
        }
        if !cols.is_multiple_of(NVFP4_BLOCK) {
            return Err(format!("{cols} input features are not a multiple of {NVFP4_BLOCK}"));
        }
        let part = |leaf, dtypes, extent| Part { name: Names::of(module, leaf), dtypes, extent };
        let [weight, input] = self.names.factors;
        let mut parts = vec![
            part(self.names.codes, &[Dtype::U8], Extent::Exact(vec![rows, cols / 2])),
            part(self.names.scales, &[Dtype::F8_E4M3], Extent::Exact(vec![rows, cols / NVFP4_BLOCK])),
            part(weight, &[Dtype::F32], Extent::One),
        ];
        if store.get(&Names::of(module, input)).is_some() {
            parts.push(part(input, &[Dtype::F32], Extent::One));
        }
        Ok(parts)
    }

    /// Calibrated scales of keys and values: here each token and head has its own.
    fn ignores(&self, name: &str) -> bool {
        [".k_scale", ".v_scale"].iter().any(|leaf| name.ends_with(leaf))
    }

    fn packed(&self, _parts: &[Stored<'_>]) -> Encoding {
        Encoding::Nvfp4
    }

    fn load(
        &self,
        _store: &Store,
        want: &Want,
        parts: &[Stored<'_>],
        rows: Range<usize>,
    ) -> Result<Elements, CheckpointError> {
        let (Shape::Matrix { cols, .. }, [codes, scales, weight, input @ ..]) = (want.shape, parts) else {
            return load_plain(want, parts, rows);
        };
        let weight = self.names.factor(*weight)?;
        let input = match input {
            [] => None,
            [input] => Some(self.names.factor(*input)?),
            _ => return Err(misused(want)),
        };
        let blocks = cols / NVFP4_BLOCK;
        // Above 0x7e come NaN and the negative values, which an amax cannot give.
        let scales =
            bytes::scales(*scales, rows.start * blocks..rows.end * blocks, |byte| byte > 0x7e, e4m3)?;
        let codes = bytes::codes(*codes, rows.start * cols / 2..rows.end * cols / 2)?;
        let runs = vec![Nvfp4Run { rows: rows.len(), weight, input }];
        Ok(Elements::Nvfp4 { codes, scales, runs })
    }
}

/// Embeddings are no linear layers, and no list mentions them.
fn is_embedding(module: &str) -> bool {
    module.rsplit('.').next().is_some_and(|last| last.contains("embed"))
}
