//! Conversions from directory to directory: bytes against outside authorities, what survives an end in the middle, and what
//! is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::quantised;
use crate::support::{decoded, dir, tensor, write};
use ctxserve_checkpoint::{
    Checkpoint, CheckpointError, Conversion, ConvertReport, Dtype, MemoryTensor, Shape, Target, Want, convert,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const DENSE: (&str, &[u8]) = ("model.safetensors", include_bytes!("../data/convert.safetensors"));
const EXPERTS: &str = "model.layers.0.mlp.experts.";

fn dense_wants() -> Vec<Want> {
    [("gate_up_proj", 64, 64), ("down_proj", 64, 32)]
        .map(|(name, rows, cols)| Want {
            name: format!("{EXPERTS}{name}"),
            shape: Shape::Experts { experts: 2, rows, cols },
        })
        .to_vec()
}

/// Converts, in files of one tensor each where `split`.
fn run(
    source: &Checkpoint,
    wants: &[Want],
    target: Target,
    to: &Path,
    split: bool,
) -> Result<ConvertReport, CheckpointError> {
    let shard_bytes = if split { 1 } else { u64::MAX };
    convert(&Conversion { source, wants, target, to, shard_bytes, inputs: &BTreeMap::new() }, &mut |_| ())
}

/// Stored bytes by name, of one file.
fn stored(bytes: &[u8]) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(name, view)| {
            (name, (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()))
        })
        .collect()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A place for results, and in it the directory that is made.
fn place() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let to = root.path().join("out");
    (root, to)
}

#[test]
fn mxfp4_is_byte_for_byte_what_numpy_makes_of_it() {
    let config =
        json!({"model_type": "gpt_oss", "vocab_size": 201_088, "eos_token_id": 200_002, "dtype": "bfloat16"});
    let from = dir(
        &config,
        &[DENSE, ("tokenizer.json", b"{}"), ("chat_template.jinja", b"{{ x }}"), ("run.py", b"")],
    );
    std::fs::write(
        from.path().join("generation_config.json"),
        br#"{"eos_token_id": [200002, 199999], "a": 1}"#,
    )
    .unwrap();
    let source = Checkpoint::open(from.path()).unwrap();
    let (root, to) = place();
    let mut seen = Vec::new();
    let conversion = Conversion {
        source: &source,
        wants: &dense_wants(),
        target: Target::Mxfp4,
        to: &to,
        shard_bytes: u64::MAX,
        inputs: &BTreeMap::new(),
    };
    let report = convert(&conversion, &mut |progress| seen.push((progress.done, progress.total))).unwrap();
    assert!(
        seen.is_sorted() && seen.last() == Some(&(source.total_bytes(), source.total_bytes())),
        "{seen:?}"
    );

    let found = stored(&std::fs::read(to.join("model.safetensors")).unwrap());
    assert_eq!(found, stored(include_bytes!("../data/convert.mxfp4.safetensors")));
    let files = [
        "chat_template.jinja",
        "config.json",
        "convert-report.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    assert_eq!(names(&to), files);
    assert_eq!(names(root.path()), ["out"]);
    assert_eq!(json_of(&to.join("config.json"))["quantization_config"]["quant_method"], "mxfp4");
    assert_eq!(
        json_of(&to.join("generation_config.json")),
        json!({"eos_token_id": [200_002, 199_999, 200_012], "a": 1})
    );

    // The reported error is the one that a reader sees.
    let made = Checkpoint::open(&to).unwrap();
    assert_eq!(made.format_name(), "mxfp4");
    made.check(&dense_wants()).unwrap();
    for (want, report) in dense_wants().iter().zip(&report.tensors) {
        let (was, is) = (source.rows(want, 0..2).unwrap(), made.rows(want, 0..2).unwrap());
        let (was, is) = (decoded(&was), decoded(&is));
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let lost = square(&mut was.iter().zip(&is).map(|(&a, &b)| f64::from(a) - f64::from(b)));
        let relative = (lost / square(&mut was.iter().map(|&a| f64::from(a)))).sqrt();
        assert!((relative - report.relative_error).abs() < relative * 1e-4, "{report:?}: {relative}");
        assert!(relative > 0.01 && relative < 0.3, "{relative}");
        assert_eq!((report.from.as_str(), report.to.as_str()), ("bf16", "mxfp4"));
        assert_eq!(report.elements, was.len() as u64);
    }
    let written = json_of(&to.join("convert-report.json"));
    assert_eq!(written["tensors"].as_array().unwrap().len(), 2);
    assert_eq!(written["worst"][0], report.worst(10)[0].name);
}

/// The weights that ModelOpt quantised, before it did.
fn before_modelopt() -> (Vec<MemoryTensor>, Vec<Want>) {
    let file = SafeTensors::deserialize(include_bytes!("../data/modelopt.values.safetensors")).unwrap();
    let (mut tensors, mut wants) = (Vec::new(), Vec::new());
    for (name, view) in file.tensors() {
        if let Some(module) = name.strip_suffix(".source") {
            let name = format!("{module}.weight");
            tensors.push(tensor(&name, Dtype::BF16, view.shape(), view.data().to_vec()));
            wants.push(Want { name, shape: Shape::Matrix { rows: view.shape()[0], cols: view.shape()[1] } });
        }
    }
    wants.sort_by(|a, b| a.name.cmp(&b.name));
    (tensors, wants)
}

#[test]
fn nvfp4_is_byte_for_byte_what_modelopt_makes_of_it() {
    let (tensors, wants) = before_modelopt();
    let source = Checkpoint::in_memory(json!({"model_type": "qwen3"}), tensors).unwrap();
    let (_root, to) = place();
    let report = run(&source, &wants, Target::Nvfp4, &to, false).unwrap();
    assert!(report.tensors.iter().all(|tensor| tensor.relative_error > 0.02 && tensor.relative_error < 0.2));
    let found = stored(&std::fs::read(to.join("model.safetensors")).unwrap());
    let reference = stored(include_bytes!("../data/modelopt.safetensors"));
    let mut compared = 0;
    for (name, wanted) in reference.iter().filter(|(name, _)| name.contains("_proj.weight")) {
        assert_eq!(&found[name], wanted, "{name}");
        compared += 1;
    }
    assert_eq!(compared, 9);
    for (name, (_, shape, data)) in found.iter().filter(|(name, _)| name.ends_with(".input_scale")) {
        assert_eq!((shape.len(), data.as_slice()), (0, &1.0_f32.to_le_bytes()[..]), "{name}");
    }
    let config = json_of(&to.join("config.json"));
    assert_eq!(config["quantization_config"]["ignore"], json!(["lm_head"]));
    let separate = json_of(&to.join("hf_quant_config.json"));
    assert_eq!(separate["quantization"]["quant_algo"], "NVFP4");
    assert!(
        json_of(&to.join("convert-report.json"))["input_scale"].as_str().unwrap().contains("not calibrated")
    );
}

#[test]
fn measured_inputs_become_factors() {
    let (tensors, config) = quantised::modelopt();
    let wants = quantised::nvfp4_wants();
    let source = Checkpoint::in_memory(config, tensors).unwrap();
    let projections: Vec<&str> = wants.iter().filter_map(|want| want.name.strip_suffix(".weight")).collect();
    let (root, to) = place();
    let inputs = BTreeMap::from([(projections[0].to_owned(), 13.44_f32)]);
    let mut conversion = Conversion {
        source: &source,
        wants: &wants,
        target: Target::Nvfp4,
        to: &to,
        shard_bytes: u64::MAX,
        inputs: &inputs,
    };
    let report = convert(&conversion, &mut |_| ()).unwrap();
    assert_eq!(report.calibrated, 1);
    let found = stored(&std::fs::read(to.join("model.safetensors")).unwrap());
    let factor =
        |module: &str| f32::from_le_bytes(found[&format!("{module}.input_scale")].2[..].try_into().unwrap());
    assert_eq!(factor(projections[0]), 13.44 / 2688.0);
    let written = json_of(&to.join("convert-report.json"));
    assert_eq!(written["input_scale"], "1 products calibrated: their largest input / 2688");
    // What was finished with other inputs, or without, is another conversion.
    let bad = BTreeMap::from([(projections[0].to_owned(), f32::NAN)]);
    let other = root.path().join("other");
    (conversion.inputs, conversion.to) = (&bad, &other);
    let message = convert(&conversion, &mut |_| ()).unwrap_err().to_string();
    assert!(message.contains(projections[0]) && message.contains("NaN") && !other.exists(), "{message}");
}

/// The values of every wanted tensor.
fn all_values(checkpoint: &Checkpoint, wants: &[Want]) -> Vec<Vec<f32>> {
    let values = |want: &Want| match want.shape {
        Shape::Vector { len } => checkpoint.vector(&want.name, len).unwrap(),
        Shape::Matrix { rows: units, .. } | Shape::Experts { experts: units, .. } => {
            decoded(&checkpoint.rows(want, 0..units).unwrap())
        }
    };
    wants.iter().map(values).collect()
}

#[test]
fn every_format_becomes_bfloat16_and_means_the_same() {
    for (base, wants) in [
        (quantised::modelopt as fn() -> _, quantised::nvfp4_wants()),
        (quantised::compressed, quantised::nvfp4_wants()),
        (quantised::mlx, quantised::mlx_wants()),
    ] {
        let (tensors, config) = base();
        let source = Checkpoint::in_memory(config, tensors).unwrap();
        for split in [false, true] {
            let (_root, to) = place();
            let report = run(&source, &wants, Target::Bf16, &to, split).unwrap();
            let made = Checkpoint::open(&to).unwrap();
            assert_eq!((made.format_name(), made.config().get("quantization")), ("dense", None));
            // These values are exact in bfloat16.
            assert!(report.worst(1).is_empty());
            // Stacks of both layers are there to show their orientation only in whole models.
            let plain: Vec<Want> =
                wants.iter().filter(|w| !matches!(w.shape, Shape::Experts { .. })).cloned().collect();
            assert_eq!(all_values(&made, &plain), all_values(&source, &plain));
            assert_eq!(to.join("model.safetensors.index.json").exists(), split);
        }
    }
}

#[test]
fn stacks_turn_round_and_come_back() {
    let packed = dir(
        &crate::support::mxfp4_config(),
        &[("model.safetensors", include_bytes!("../data/packed.safetensors"))],
    );
    let source = Checkpoint::open(packed.path()).unwrap();
    let wants: Vec<Want> = [("gate_up_proj", 128), ("down_proj", 64)]
        .map(|(name, rows)| Want {
            name: format!("{EXPERTS}{name}"),
            shape: Shape::Experts { experts: 3, rows, cols: 64 },
        })
        .to_vec();
    let (root, dense) = place();
    run(&source, &wants, Target::Bf16, &dense, false).unwrap();
    // What transformers dequantised: the same bytes, [E, in, out].
    let found = stored(&std::fs::read(dense.join("model.safetensors")).unwrap());
    assert_eq!(found, stored(include_bytes!("../data/dense.safetensors")));
    // Packed as it was, the codes are the ones that were there; from the dense one they mean the same.
    let (again, back) = (root.path().join("again"), root.path().join("back"));
    let report = run(&source, &wants, Target::Mxfp4, &again, true).unwrap();
    assert!(report.worst(10).is_empty() && report.tensors[0].from == "mxfp4");
    let again = Checkpoint::open(&again).unwrap();
    for want in &wants {
        assert_eq!(again.rows(want, 0..3).unwrap(), source.rows(want, 0..3).unwrap());
    }
    let report = run(&Checkpoint::open(&dense).unwrap(), &wants, Target::Mxfp4, &back, false).unwrap();
    assert!(report.worst(10).is_empty(), "{:?}", report.worst(1));
    assert_eq!(all_values(&Checkpoint::open(&back).unwrap(), &wants), all_values(&source, &wants));
}

#[test]
fn nvfp4_that_is_there_is_kept() {
    let (tensors, config) = quantised::compressed();
    let source = Checkpoint::in_memory(config, tensors).unwrap();
    let (_root, to) = place();
    let wants = quantised::nvfp4_wants();
    let report = run(&source, &wants, Target::Nvfp4, &to, false).unwrap();
    assert!(report.worst(1).is_empty());
    let made = Checkpoint::open(&to).unwrap();
    let [q, _] = wants.as_slice() else { panic!() };
    // Factors, that of the inputs among them, are turned round.
    assert_eq!(made.rows(q, 0..2).unwrap(), source.rows(q, 0..2).unwrap());
}

/// Everything in a directory.
fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    names(dir).into_iter().map(|name| (name.clone(), std::fs::read(dir.join(name)).unwrap())).collect()
}

#[test]
fn what_was_finished_survives_and_the_end_is_the_same() {
    let (tensors, config) = quantised::mlx();
    let wants = quantised::mlx_wants();
    let good = Checkpoint::in_memory(config.clone(), tensors.clone()).unwrap();
    let (root, to) = place();
    let whole = root.path().join("whole");
    run(&good, &wants, Target::Bf16, &whole, true).unwrap();

    let from = dir(&config, &[]);
    let weights = from.path().join("model.safetensors");
    write(&weights, &tensors);
    let source = Checkpoint::open(from.path()).unwrap();
    let before = content(from.path());
    let partial = root.path().join("out.partial");
    // Ends in the middle of the third tensor, as a crash would: nothing is unwound.
    let mut left = 3;
    let conversion = Conversion {
        source: &source,
        wants: &wants,
        target: Target::Bf16,
        to: &to,
        shard_bytes: 1,
        inputs: &BTreeMap::new(),
    };
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        convert(&conversion, &mut |progress| {
            left -= usize::from(!progress.tensor.is_empty());
            assert!(left > 0, "ended on purpose");
        })
    }));
    assert!(ended.is_err() && !to.exists() && partial.is_dir());
    let kept = names(&partial);
    assert!(!kept.is_empty() && kept.len() < 4, "{kept:?}");
    let leftover = partial.join(".model-00004-of-00004.safetensors.1.part");
    std::fs::write(&leftover, b"half").unwrap();
    // One of the files that were finished has a bad bit: it is made again.
    let damaged = partial.join(&kept[0]);
    let mut bytes = std::fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&damaged, bytes).unwrap();

    let mut skipped = 0;
    let report =
        convert(&conversion, &mut |progress| skipped += usize::from(progress.tensor.is_empty())).unwrap();
    assert_eq!(skipped, kept.len() - 1);
    assert_eq!(report.tensors.len(), wants.len());
    assert_eq!(content(&to), content(&whole));
    assert_eq!(content(from.path()), before);
    assert_eq!(names(root.path()), ["out", "whole"]);
}

#[test]
fn another_conversion_is_not_continued() {
    let (tensors, config) = quantised::mlx();
    let wants = quantised::mlx_wants();
    let from = dir(&config, &[]);
    let weights = from.path().join("model.safetensors");
    write(&weights, &tensors);
    let (root, to) = place();
    let source = Checkpoint::open(from.path()).unwrap();
    let conversion = Conversion {
        source: &source,
        wants: &wants,
        target: Target::Bf16,
        to: &to,
        shard_bytes: 1,
        inputs: &BTreeMap::new(),
    };
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        convert(&conversion, &mut |_| panic!("ended on purpose"))
    }));
    assert!(ended.is_err());
    let before = content(&root.path().join("out.partial"));
    // The source was replaced by one of the same shape.
    std::fs::remove_file(&weights).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    write(&weights, &tensors);
    let source = Checkpoint::open(from.path()).unwrap();
    let message = run(&source, &wants, Target::Bf16, &to, true).unwrap_err().to_string();
    assert!(message.contains("out.partial: was begun from another source"), "{message}");
    assert_eq!(content(&root.path().join("out.partial")), before);
}

#[test]
fn a_bad_source_is_named_and_loses_nothing() {
    let (mut tensors, config) = quantised::mlx();
    let scales = tensors.iter_mut().find(|tensor| tensor.name.ends_with("q_proj.scales")).unwrap();
    scales.data[0] = 255;
    let source = Checkpoint::in_memory(config, tensors).unwrap();
    let (root, to) = place();
    let wants = quantised::mlx_wants();
    for _ in 0..2 {
        let message = run(&source, &wants, Target::Bf16, &to, true).unwrap_err().to_string();
        assert!(message.contains("q_proj.scales\": scale [0, 0] is NaN"), "{message}");
        assert!(!to.exists());
        // The router was finished before.
        assert_eq!(names(&root.path().join("out.partial")), ["model-00001-of-00004.safetensors"]);
    }
    let huge = vec![tensor("model.norm.weight", Dtype::F32, &[1], f32::MAX.to_le_bytes().to_vec())];
    let source = Checkpoint::in_memory(json!({}), huge).unwrap();
    let want = [Want { name: "model.norm.weight".to_owned(), shape: Shape::Vector { len: 1 } }];
    let message = run(&source, &want, Target::Bf16, &root.path().join("b"), true).unwrap_err().to_string();
    assert!(
        message.contains("model.norm.weight\": 340282350000000000000000000000000000000 is beyond"),
        "{message}"
    );
}

#[test]
fn nothing_is_overwritten() {
    let from = dir(&json!({}), &[DENSE]);
    let source = Checkpoint::open(from.path()).unwrap();
    let (root, to) = place();
    std::fs::create_dir(&to).unwrap();
    let refused = |to: &Path| run(&source, &dense_wants(), Target::Mxfp4, to, false).unwrap_err().to_string();
    assert!(refused(&to).contains("out: is there already, and nothing is overwritten"), "{}", refused(&to));
    std::fs::remove_dir(&to).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", &to).unwrap();
        assert!(refused(&to).contains("is there already"));
        std::fs::remove_file(&to).unwrap();
    }
    assert!(refused(&from.path().join("inside")).contains("lies in the source"));
    assert!(refused(from.path()).contains("is there already"));
    assert!(refused(Path::new("/")).contains("does not name a directory"));
    assert!(refused(&root.path().join("no/such/place")).contains("no/such"));
    std::fs::create_dir(root.path().join("out.partial")).unwrap();
    assert!(refused(&to).contains("no conversion has left it"));
    assert_eq!(names(root.path()), ["out.partial"]);
    // A model that is not the one that was asked for is refused before anything is made.
    std::fs::remove_dir(root.path().join("out.partial")).unwrap();
    let message = run(&source, &quantised::mlx_wants(), Target::Bf16, &to, false).unwrap_err().to_string();
    assert!(message.contains("do not fit the model"), "{message}");
    assert!(names(root.path()).is_empty());
}
