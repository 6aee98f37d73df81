//! Storage formats, one file and one row each.
//!
//! Which one a checkpoint has is read from its configuration and checked against its tensors; its name says
//! nothing (one repository called "MXFP4" holds something else).

mod dense;
mod mxfp4;

use std::fmt::Debug;
use std::path::Path;

use ctxserve_core::Elements;
use serde_json::Value;

use crate::check::{Extent, Part, Shape, Want};
use crate::error::{CheckpointError, clipped};
use crate::store::{Store, Stored};
use crate::values::{self, FLOATS};

/// The table: first row that claims what the configuration declares.
static FORMATS: &[&dyn QuantFormat] = &[&mxfp4::Mxfp4, &dense::Dense];

/// How logical tensors are stored.
pub(crate) trait QuantFormat: Debug + Sync {
    /// Name for messages, and of the kernel that reads it packed.
    fn name(&self) -> &'static str;

    /// Whether this format stores what the configuration declares (see [`declared`]).
    fn claims(&self, method: Option<&str>) -> bool;

    /// Whether the tensors are what the configuration says, as far as names and types show.
    fn verify(&self, store: &Store) -> Result<(), CheckpointError>;

    /// The stored tensors that `want` is made of, whether or not they exist. The error says why `want` cannot
    /// be stored so at all.
    fn parts(&self, store: &Store, want: &Want) -> Result<Vec<Part>, String>;

    /// Reads a matrix or an expert stack, `[out, in]`, from the tensors that [`Self::parts`] named, in that
    /// order and known to have the types and shapes it asked for.
    fn load(&self, store: &Store, want: &Want, parts: &[Stored<'_>]) -> Result<Elements, CheckpointError>;
}

/// Picks the format for a configuration and its tensors. `dir` names files in messages.
pub(crate) fn detect(
    dir: Option<&Path>,
    config: &Value,
    hf_quant_config: Option<&Value>,
    store: &Store,
) -> Result<&'static dyn QuantFormat, CheckpointError> {
    let path = |name: &str| {
        dir.map_or_else(|| format!("<memory>/{name}"), |dir| dir.join(name).display().to_string())
    };
    let declared = declared(config, hf_quant_config)
        .map_err(|problem| CheckpointError::File { file: path("config.json"), problem })?;
    let method = declared.as_ref().map(|declared| declared.method.as_str());
    match FORMATS.iter().find(|format| format.claims(method)) {
        Some(format) => format.verify(store).map(|()| *format),
        None => Err(CheckpointError::UnsupportedQuantization {
            file: path(declared.as_ref().map_or("config.json", |declared| declared.file)),
            method: clipped(method.unwrap_or("none")),
            supported: FORMATS.iter().map(|format| format.name()).collect::<Vec<_>>().join(", "),
        }),
    }
}

struct Declared {
    method: String,
    file: &'static str,
}

/// What the configuration says about quantisation, in one string: `mxfp4`, `modelopt NVFP4`,
/// `compressed-tensors nvfp4-pack-quantized`, `mlx affine`, or nothing.
fn declared(config: &Value, hf_quant_config: Option<&Value>) -> Result<Option<Declared>, String> {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let section = |key: &str| match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) if value.is_object() => Ok(Some(value)),
        Some(_) => Err(format!("{key} is not an object")),
    };
    // MLX writes its section twice, the second time without a method: so the first one decides.
    if let Some(mlx) = section("quantization")? {
        let mode = text(mlx, "mode").unwrap_or_else(|| "affine".to_owned());
        return Ok(Some(Declared { method: format!("mlx {mode}"), file: "config.json" }));
    }
    if let Some(hf) = section("quantization_config")? {
        let method = text(hf, "quant_method").ok_or("quantization_config has no quant_method")?;
        let detail = text(hf, "quant_algo").or_else(|| text(hf, "format"));
        let method = detail.map_or_else(|| method.clone(), |detail| format!("{method} {detail}"));
        return Ok(Some(Declared { method, file: "config.json" }));
    }
    let algorithm =
        hf_quant_config.and_then(|file| file.get("quantization")).and_then(|q| text(q, "quant_algo"));
    Ok(algorithm.map(|name| Declared { method: format!("modelopt {name}"), file: "hf_quant_config.json" }))
}

/// A tensor stored under its own name as floats: vectors, and `[rows, cols]` matrices.
fn plain(want: &Want) -> Part {
    let extent = match want.shape {
        Shape::Vector { len } => Extent::Flat(len),
        Shape::Matrix { rows, cols } => Extent::Exact(vec![rows, cols]),
        Shape::Experts { experts, rows, cols } => Extent::Exact(vec![experts, rows, cols]),
    };
    Part { name: want.name.clone(), dtypes: FLOATS, extent }
}

/// Reads what [`plain`] described.
fn load_plain(want: &Want, parts: &[Stored<'_>]) -> Result<Elements, CheckpointError> {
    match parts {
        [tensor] => values::elements(*tensor),
        _ => Err(misused(want)),
    }
}

/// A format was given other parts than it asked for: a defect here, not in a file.
pub(crate) fn misused(want: &Want) -> CheckpointError {
    CheckpointError::Tensor {
        file: "<checkpoint>".to_owned(),
        tensor: crate::error::quoted(&want.name),
        problem: "is not stored in the parts that its format names".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_declared_method_is_one_string() {
        let cases = [
            (json!({}), None),
            (json!({"quantization_config": null, "quantization": null}), None),
            (json!({"quantization_config": {"quant_method": "mxfp4"}}), Some("mxfp4")),
            (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), Some("gptq")),
            (
                json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
                Some("modelopt NVFP4"),
            ),
            (
                json!({"quantization_config":
                    {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}}),
                Some("compressed-tensors nvfp4-pack-quantized"),
            ),
            // What mlx-lm writes: both sections, no method.
            (
                json!({"quantization": {"group_size": 64, "bits": 4},
                       "quantization_config": {"group_size": 64, "bits": 4}}),
                Some("mlx affine"),
            ),
            (json!({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}), Some("mlx mxfp4")),
        ];
        for (config, wanted) in cases {
            let method = declared(&config, None).unwrap().map(|declared| declared.method);
            assert_eq!(method.as_deref(), wanted, "{config}");
        }
        let separate = json!({"quantization": {"quant_algo": "NVFP4", "group_size": 16}});
        let declared = declared(&json!({}), Some(&separate)).unwrap().unwrap();
        assert_eq!((declared.method.as_str(), declared.file), ("modelopt NVFP4", "hf_quant_config.json"));
    }

    #[test]
    fn a_section_that_says_nothing_is_an_error() {
        for config in [
            json!({"quantization_config": {"bits": 4}}),
            json!({"quantization_config": {"quant_method": 4}}),
            json!({"quantization_config": "mxfp4"}),
            json!({"quantization": [4]}),
        ] {
            assert!(declared(&config, None).is_err(), "{config}");
        }
    }
}
