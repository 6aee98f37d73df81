//! Converted checkpoints whose inputs were measured, on a backend that rounds inputs by what was written.

use std::collections::BTreeMap;

use ctxserve_checkpoint::{Checkpoint, Conversion, Target, convert};
use ctxserve_cpu::{ActivationQuant, CpuBackend, CpuOptions};
use ctxserve_models::wants;

use crate::common::{Driver, Sequence, cases, golden_dir, open, relative_l2};

const GOLDEN: &str = "qwen3";

#[test]
fn calibrated_inputs_are_what_activations_are_rounded_by() {
    let source = open(GOLDEN);
    let wants = wants(&source).unwrap();
    let file = std::fs::read(golden_dir(GOLDEN).join("inputs.json")).unwrap();
    let measured: BTreeMap<String, f32> = serde_json::from_slice(&file).unwrap();
    let root = tempfile::tempdir().unwrap();
    let converted = |name: &str, factor: f32| {
        let to = root.path().join(name);
        let inputs = measured.iter().map(|(module, input)| (module.clone(), input * factor)).collect();
        let target = Target::Nvfp4;
        let conversion = Conversion {
            source: &source,
            wants: &wants,
            target,
            to: &to,
            shard_bytes: 1 << 20,
            inputs: &inputs,
        };
        convert(&conversion, &mut |_| ()).unwrap();
        Checkpoint::open(&to).unwrap()
    };
    let case = &cases(GOLDEN)[1];
    let logits = |checkpoint: &Checkpoint, activations| {
        let backend = CpuBackend::new(CpuOptions { activations, ..CpuOptions::default() }).unwrap();
        let mut driver = Driver::new(checkpoint, backend, 600);
        driver.step(&mut [(&mut Sequence::default(), &case.prompt, true)]).remove(0)
    };
    let measured = converted("measured", 1.0);
    let exact = logits(&measured, ActivationQuant::None);
    let lost = |checkpoint: &Checkpoint| relative_l2(&logits(checkpoint, ActivationQuant::Nvfp4), &exact);
    let found = lost(&measured);
    // Inputs cut off at a fiftieth of what they reach, and factors so large that small inputs have no scale.
    let (cut, coarse) = (lost(&converted("cut", 0.02)), lost(&converted("coarse", 1e5)));
    assert!(found > 1e-3 && found < 0.5, "{found}");
    assert!(cut > 1.5 * found && coarse > 1.5 * found, "{found}, {cut}, {coarse}");
}
