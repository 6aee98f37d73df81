//! Experts quantised while they load: the logits are those of the converted checkpoint.

use std::collections::BTreeMap;

use ctxserve_checkpoint::{Checkpoint, Conversion, Dtype, MemoryTensor, Target, convert};
use ctxserve_cpu::CpuBackend;
use ctxserve_models::{inspect, wants};
use half::bf16;
use safetensors::SafeTensors;

use crate::common::{Driver, OPTIONS, Random, Sequence, cases, golden_dir, relative_l2};
use crate::goldens::exact;

/// The dense golden. Its experts are what MXFP4 holds exactly; `spoilt` they are not.
fn dense(spoilt: bool) -> Checkpoint {
    let dir = golden_dir("dense");
    let config = std::fs::read(dir.join("config.json")).unwrap();
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let mut random = Random(3);
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        assert_eq!(view.dtype(), safetensors::Dtype::BF16);
        let mut data = view.data().to_vec();
        if spoilt && name.contains("experts") {
            for bytes in data.chunks_exact_mut(2) {
                let value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
                let value = value * (0.75 + random.below(500) as f32 / 1000.0);
                bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
        }
        MemoryTensor { name, dtype: Dtype::BF16, shape: view.shape().to_vec(), data }
    };
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors = tensors.into_iter().map(tensor).collect();
    Checkpoint::in_memory(serde_json::from_slice(&config).unwrap(), tensors).unwrap()
}

/// The logits of every prompt of the golden.
fn logits(checkpoint: &Checkpoint, backend: CpuBackend) -> Vec<Vec<f32>> {
    let mut driver = Driver::new(checkpoint, backend, 120);
    cases("mxfp4")
        .iter()
        .map(|case| {
            let mut sequence = Sequence::default();
            let logits = driver.step(&mut [(&mut sequence, &case.prompt, true)]).remove(0);
            driver.finish(sequence);
            logits
        })
        .collect()
}

#[test]
fn logits_are_those_of_the_converted_checkpoint() {
    for spoilt in [false, true] {
        let source = dense(spoilt);
        let wants = wants(&source).unwrap();
        let root = tempfile::tempdir().unwrap();
        let to = root.path().join("out");
        let conversion = Conversion {
            source: &source,
            wants: &wants,
            target: Target::Mxfp4,
            to: &to,
            shard_bytes: u64::MAX,
            inputs: &BTreeMap::new(),
        };
        convert(&conversion, &mut |_| ()).unwrap();
        let converted = Checkpoint::open(&to).unwrap();
        let quantised = dense(spoilt).with_experts_in_mxfp4(&wants).unwrap();
        let facts = |checkpoint| {
            let info = inspect(checkpoint, &OPTIONS).unwrap();
            (info.weight_bytes, info.costs)
        };
        assert_eq!(facts(&quantised), facts(&converted));
        assert!(facts(&quantised).0 < facts(&source).0);
        for backend in [exact, CpuBackend::plain] {
            let (is, wanted) = (logits(&quantised, backend()), logits(&converted, backend()));
            assert!(is == wanted, "spoilt {spoilt}");
            // What is lost is seen, where something is.
            let lost = relative_l2(&is[0], &logits(&source, backend())[0]);
            assert!(if spoilt { lost > 1e-3 } else { lost < 1e-4 }, "spoilt {spoilt}: {lost:e}");
        }
    }
}
