//! What a conversion lost.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{TOOL, Target};

/// One tensor's part of a conversion.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TensorReport {
    /// Its logical name.
    pub name: String,
    /// How it was stored: an encoding, such as `bf16` or `affine`.
    pub from: String,
    /// How it is stored now.
    pub to: String,
    /// Elements.
    pub elements: u64,
    /// Root of the sum of squared differences by the sum of squares.
    pub relative_error: f64,
}

/// What became of each tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertReport {
    /// The source's storage format.
    pub from: String,
    /// The format that was written.
    pub to: Target,
    /// Products whose `input_scale` was calibrated.
    pub calibrated: usize,
    /// Every tensor, in the order of the model.
    pub tensors: Vec<TensorReport>,
}

impl ConvertReport {
    pub(super) fn new(from: &str, to: Target, calibrated: usize, tensors: Vec<TensorReport>) -> Self {
        Self { from: from.to_owned(), to, calibrated, tensors }
    }

    /// The `count` tensors that lost most, the worst first; those that lost nothing are left out.
    pub fn worst(&self, count: usize) -> Vec<&TensorReport> {
        let mut lossy: Vec<&TensorReport> = self.tensors.iter().filter(|t| t.relative_error > 0.0).collect();
        lossy.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error).then_with(|| a.name.cmp(&b.name)));
        lossy.truncate(count);
        lossy
    }

    /// What is written beside the weights.
    pub(super) fn to_json(&self) -> Value {
        let worst: Vec<&str> = self.worst(10).into_iter().map(|tensor| tensor.name.as_str()).collect();
        let input = match (self.to, self.calibrated) {
            (Target::Nvfp4, 0) => {
                Some("1.0 in every module that had none: inputs were not calibrated".to_owned())
            }
            (Target::Nvfp4, count) => {
                Some(format!("{count} products calibrated: their largest input / 2688"))
            }
            _ => None,
        };
        json!({
            "tool": format!("{TOOL} {}", env!("CARGO_PKG_VERSION")),
            "from": self.from,
            "to": self.to.to_string(),
            "input_scale": input,
            "worst": worst,
            "tensors": self.tensors,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_come_first() {
        let tensor = |name: &str, relative_error| TensorReport {
            name: name.to_owned(),
            from: "bf16".to_owned(),
            to: "mxfp4".to_owned(),
            elements: 1,
            relative_error,
        };
        let tensors = vec![tensor("a", 0.1), tensor("b", 0.0), tensor("d", 0.3), tensor("c", 0.3)];
        let report = ConvertReport::new("dense", Target::Mxfp4, 0, tensors);
        let names = |count| report.worst(count).into_iter().map(|t| t.name.as_str()).collect::<Vec<_>>();
        assert_eq!(names(10), ["c", "d", "a"]);
        assert_eq!(names(2), ["c", "d"]);
        let json = report.to_json();
        assert_eq!((json["to"].as_str(), &json["input_scale"]), (Some("mxfp4"), &Value::Null));
        assert_eq!(json["tensors"][3]["relative_error"], 0.3);
    }
}
