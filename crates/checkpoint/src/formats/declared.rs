//! What the configuration says about quantisation.

use serde_json::Value;

/// A section that declares a quantisation.
#[derive(Debug)]
pub(super) struct Declared<'a> {
    /// In one string: `mxfp4`, `modelopt NVFP4`, `compressed-tensors nvfp4-pack-quantized`, `mlx affine`.
    pub(super) method: String,
    /// File that says so.
    pub(super) file: &'static str,
    /// The objects that say so, the one to believe first.
    pub(super) sections: Vec<&'a Value>,
}

const CONFIG: &str = "config.json";
const SEPARATE: &str = "hf_quant_config.json";

/// Reads both files; `None` where neither declares a quantisation.
pub(super) fn declared<'a>(
    config: &'a Value,
    hf_quant_config: Option<&'a Value>,
) -> Result<Option<Declared<'a>>, String> {
    // MLX writes its section twice, the second time without a method: so the first one decides.
    if let Some(mlx) = object(config, "quantization")? {
        let mode = text(mlx, "mode")?.unwrap_or("affine");
        return Ok(Some(Declared { method: format!("mlx {mode}"), file: CONFIG, sections: vec![mlx] }));
    }
    // ModelOpt's own file nests the section, and some write that form into config.json.
    let separate = match hf_quant_config {
        Some(file) => object(file, "quantization")?,
        None => None,
    };
    let Some(section) = object(config, "quantization_config")? else {
        let Some(section) = separate else { return Ok(None) };
        let Some(algorithm) = text(section, "quant_algo")? else { return Ok(None) };
        let method = format!("modelopt {algorithm}");
        return Ok(Some(Declared { method, file: SEPARATE, sections: vec![section] }));
    };
    let method = text(section, "quant_method")?.ok_or("quantization_config has no quant_method")?;
    if !matches!(method, "modelopt" | "modelopt_fp4") {
        let method = match text(section, "format")?.or(text(section, "quant_algo")?) {
            Some(detail) => format!("{method} {detail}"),
            None => method.to_owned(),
        };
        return Ok(Some(Declared { method, file: CONFIG, sections: vec![section] }));
    }
    let sections: Vec<&Value> =
        [Some(section), object(section, "quantization")?, separate].into_iter().flatten().collect();
    let mut algorithm = None;
    for section in &sections {
        match (algorithm, text(section, "quant_algo")?) {
            (Some(first), Some(second)) if first != second => {
                return Err(format!("quant_algo is {first:?}, and elsewhere {second:?}"));
            }
            (first, second) => algorithm = first.or(second),
        }
    }
    let algorithm = algorithm.ok_or("quantization_config has no quant_algo")?;
    Ok(Some(Declared { method: format!("modelopt {algorithm}"), file: CONFIG, sections }))
}

impl<'a> Declared<'a> {
    /// The first section that has `key`, null counting as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.sections.iter().find_map(|section| section.get(key).filter(|value| !value.is_null()))
    }
}

/// An optional object; null counts as absent.
pub(super) fn object<'a>(value: &'a Value, key: &str) -> Result<Option<&'a Value>, String> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) if value.is_object() => Ok(Some(value)),
        Some(_) => Err(format!("{key} is not an object")),
    }
}

/// An optional string; null counts as absent.
pub(super) fn text<'a>(value: &'a Value, key: &str) -> Result<Option<&'a str>, String> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("{key} is not a string")),
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
                    {"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "NVFP4"}}}),
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
    }

    #[test]
    fn modelopt_s_own_file_speaks_where_the_configuration_does_not() {
        let separate = json!({"quantization": {"quant_algo": "NVFP4", "group_size": 16}});
        let config = json!({});
        let found = declared(&config, Some(&separate)).unwrap().unwrap();
        assert_eq!((found.method.as_str(), found.file), ("modelopt NVFP4", SEPARATE));
        let config = json!({"quantization_config": {"quant_method": "modelopt"}});
        let found = declared(&config, Some(&separate)).unwrap().unwrap();
        assert_eq!((found.method.as_str(), found.file), ("modelopt NVFP4", CONFIG));
        assert_eq!(found.get("group_size"), Some(&json!(16)));
        let other = json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}});
        assert!(declared(&other, Some(&separate)).unwrap_err().contains("\"FP8\", and elsewhere \"NVFP4\""));
        // A file that says that nothing was quantised.
        let nothing = json!({"quantization": {"quant_algo": null}});
        assert!(declared(&json!({}), Some(&nothing)).unwrap().is_none());
    }

    #[test]
    fn a_section_that_says_nothing_is_an_error() {
        for config in [
            json!({"quantization_config": {"bits": 4}}),
            json!({"quantization_config": {"quant_method": 4}}),
            json!({"quantization_config": {"quant_method": "modelopt"}}),
            json!({"quantization_config": "mxfp4"}),
            json!({"quantization": [4]}),
            json!({"quantization": {"mode": 1}}),
        ] {
            assert!(declared(&config, None).is_err(), "{config}");
        }
    }
}
