//! Files written and read back, by this crate and by the reference implementation.

use std::collections::HashMap;

use crate::support::{bf16s, dir, f16s, f32s, mxfp4_config, raw, tensor, write};
use ctxserve_checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec};
use ctxserve_core::Elements;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::json;

fn ramp(count: usize) -> impl Iterator<Item = f32> {
    (0..count).map(|i| i as f32 - 7.0)
}

#[test]
fn the_reference_reads_what_is_written_here() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.safetensors");
    let tensors = [
        tensor("codes", Dtype::U8, &[3], vec![1, 2, 3]),
        tensor("scalar", Dtype::F32, &[], f32s([2.5])),
        tensor("empty", Dtype::F16, &[0, 7], vec![]),
        tensor("weight", Dtype::BF16, &[2, 5], bf16s(ramp(10))),
    ];
    write(&path, &tensors);
    let bytes = std::fs::read(&path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), tensors.len());
    for wanted in &tensors {
        let view = read.tensor(&wanted.name).unwrap();
        assert_eq!(format!("{:?}", view.dtype()), wanted.dtype.to_string());
        assert_eq!((view.shape(), view.data()), (&wanted.shape[..], &wanted.data[..]), "{}", wanted.name);
        // Aligned to its type, as readers that map the file need.
        let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(offset % (wanted.dtype.bits() as usize / 8), 0, "{}", wanted.name);
    }
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn what_the_reference_writes_is_read_here() {
    let (weight, scales, half) = (bf16s(ramp(10)), f32s(ramp(3)), f16s(ramp(2)));
    let views = vec![
        ("weight", TensorView::new(safetensors::Dtype::BF16, vec![2, 5], &weight).unwrap()),
        ("norm", TensorView::new(safetensors::Dtype::F32, vec![3], &scales).unwrap()),
        ("half", TensorView::new(safetensors::Dtype::F16, vec![2], &half).unwrap()),
    ];
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    let bytes = safetensors::serialize(views, metadata).unwrap();
    let generation = json!({"eos_token_id": [1, 2]}).to_string();
    let dir = dir(
        &json!({"model_type": "x"}),
        &[("model.safetensors", &bytes), ("generation_config.json", generation.as_bytes())],
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config()["model_type"], "x");
    assert_eq!(checkpoint.generation_config().unwrap()["eos_token_id"], json!([1, 2]));
    assert_eq!(checkpoint.dir(), Some(dir.path()));
    assert_eq!(checkpoint.total_bytes(), 20 + 12 + 4);
    assert!(checkpoint.contains("norm") && !checkpoint.contains("bias"));
    assert_eq!(checkpoint.vector("norm", 3).unwrap(), [-7.0, -6.0, -5.0]);
    assert_eq!(checkpoint.vector("half", 2).unwrap(), [-7.0, -6.0]);
    let matrix = checkpoint.matrix("weight", 2, 5).unwrap();
    let Elements::Bf16(values) = matrix.elements() else { panic!("bf16 stays bf16") };
    assert!(values.iter().zip(ramp(10)).all(|(value, wanted)| value.to_f32() == wanted));
}

#[test]
fn shards_are_one_checkpoint() {
    const A: &str = "model-00001-of-00002.safetensors";
    const B: &str = "model-00002-of-00002.safetensors";
    let map = json!({"metadata": {"total_size": 20}, "weight_map": {
        "x_blocks": B, "x_scales": A, "norm": A,
    }});
    let dir = dir(&mxfp4_config(), &[("model.safetensors.index.json", map.to_string().as_bytes())]);
    let scales = tensor("x_scales", Dtype::U8, &[1, 2, 1], vec![127, 126]);
    write(&dir.path().join(A), &[scales, tensor("norm", Dtype::F32, &[1], f32s([1.0]))]);
    write(&dir.path().join(B), &[tensor("x_blocks", Dtype::U8, &[1, 2, 1, 16], (0..32).collect())]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let matrix = checkpoint.experts("x", 1, 2, 32).unwrap();
    assert_eq!(matrix.elements(), &Elements::Mxfp4 { codes: (0..32).collect(), scales: vec![127, 126] });
    assert_eq!(checkpoint.vector("norm", 1).unwrap(), [1.0]);
}

#[cfg(unix)]
#[test]
fn links_into_a_cache_are_followed() {
    let blobs = tempfile::tempdir().unwrap();
    write(&blobs.path().join("0123"), &[tensor("norm", Dtype::F32, &[1], f32s([1.0]))]);
    let dir = dir(&json!({}), &[]);
    std::os::unix::fs::symlink(blobs.path().join("0123"), dir.path().join("model.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().vector("norm", 1).unwrap(), [1.0]);
}

#[test]
fn data_that_is_not_aligned_is_read_right() {
    // Allowed by the format, refused by readers that cast mapped memory.
    let header = r#"{"a":{"dtype":"U8","shape":[1,1,1,16],"data_offsets":[0,16]},
        "b":{"dtype":"U8","shape":[1,1,1],"data_offsets":[16,17]},
        "n":{"dtype":"F32","shape":[2],"data_offsets":[17,25]}}"#
        .replace("\"a\"", "\"x_blocks\"")
        .replace("\"b\"", "\"x_scales\"");
    let data = [vec![0; 17], f32s([1.25, -3.0])].concat();
    let dir = dir(&mxfp4_config(), &[("model.safetensors", &raw(&header, &data))]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().vector("n", 2).unwrap(), [1.25, -3.0]);
}

#[test]
fn a_file_cut_after_opening_is_an_error_that_names_the_tensor() {
    let dir = dir(&json!({}), &[]);
    let path = dir.path().join("model.safetensors");
    write(&path, &[tensor("norm", Dtype::F32, &[64], f32s(ramp(64)))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let message = checkpoint.vector("norm", 64).unwrap_err().to_string();
    assert!(message.contains("model.safetensors: tensor \"norm\""), "{message}");
}

/// Several times what one thread reads at once, of every kind that is read so.
#[test]
fn large_tensors_are_read_right_in_pieces() {
    let (rows, cols) = (1201, 7104); // not whole pieces in any type
    let count = rows * cols;
    let value = |i: usize| (i % 509) as f32 - 254.0;
    let bytes: Vec<u8> = (0..count / 2).map(|i| (i % 251) as u8).collect();
    let scales: Vec<u8> = (0..count / 32).map(|i| (i % 241) as u8).collect();
    let dir = dir(&mxfp4_config(), &[]);
    let path = dir.path().join("model.safetensors");
    let tensors = [
        tensor("single", Dtype::F32, &[rows, cols], f32s((0..count).map(value))),
        tensor("half", Dtype::F16, &[rows, cols], f16s((0..count).map(value))),
        tensor("brain", Dtype::BF16, &[rows, cols], bf16s((0..count).map(|i| value(i % 200)))),
        tensor("x_blocks", Dtype::U8, &[1, rows, cols / 32, 16], bytes.clone()),
        tensor("x_scales", Dtype::U8, &[1, rows, cols / 32], scales.clone()),
    ];
    write(&path, &tensors);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for name in ["single", "half"] {
        let matrix = checkpoint.matrix(name, rows, cols).unwrap();
        let Elements::F32(values) = matrix.elements() else { panic!("{name}") };
        assert!(values.iter().copied().eq((0..count).map(value)), "{name}");
    }
    let Elements::Bf16(values) = checkpoint.matrix("brain", rows, cols).unwrap().into_elements() else {
        panic!("brain")
    };
    assert!(values.iter().map(|v| v.to_f32()).eq((0..count).map(|i| value(i % 200))));
    let stack = checkpoint.experts("x", 1, rows, cols).unwrap();
    assert_eq!(stack.elements(), &Elements::Mxfp4 { codes: bytes, scales });

    // None of them is whole any more, wherever the cut is.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 10).unwrap();
    let outcomes = [
        ("single", checkpoint.matrix("single", rows, cols)),
        ("half", checkpoint.matrix("half", rows, cols)),
        ("brain", checkpoint.matrix("brain", rows, cols)),
        ("x_", checkpoint.experts("x", 1, rows, cols)),
    ];
    for (name, outcome) in outcomes {
        let message = outcome.map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(&format!("model.safetensors: tensor \"{name}")), "{message}");
    }
}

#[test]
fn the_first_bad_element_of_a_large_tensor_is_named() {
    let (rows, cols) = (1024, 8192);
    let mut values = vec![0.0; rows * cols];
    for at in [700 * cols + 5, 701 * cols, 1023 * cols] {
        values[at] = f32::INFINITY;
    }
    let tensors = vec![tensor("w", Dtype::F32, &[rows, cols], f32s(values))];
    let checkpoint = Checkpoint::in_memory(json!({}), tensors).unwrap();
    for _ in 0..10 {
        let message = checkpoint.matrix("w", rows, cols).unwrap_err().to_string();
        assert!(message.contains("element [700, 5] is inf"), "{message}");
    }
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

#[test]
fn writing_is_in_pieces_in_any_order_and_appears_at_once() {
    let out = dir(&json!({}), &[("model.safetensors", b"old")]);
    let path = out.path().join("model.safetensors");
    let specs = [spec("a", Dtype::F32, &[2]), spec("b", Dtype::F32, &[1])];
    let mut writer = SafetensorsWriter::create(&path, &specs, &[]).unwrap();
    let a = f32s([1.0, 2.0]);
    writer.write("a", &a[..3]).unwrap();
    writer.write("b", &f32s([3.0])).unwrap();
    writer.write("a", &a[3..]).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"old", "untouched until finished");
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(out.path()).unwrap();
    assert_eq!(checkpoint.vector("a", 2).unwrap(), [1.0, 2.0]);
    assert_eq!(checkpoint.vector("b", 1).unwrap(), [3.0]);
    let files: Vec<_> = std::fs::read_dir(out.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(files.len(), 2, "{files:?}");
}

#[test]
fn an_unfinished_file_leaves_nothing() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.safetensors");
    let specs = [spec("a", Dtype::F32, &[2])];
    let mut writer = SafetensorsWriter::create(&path, &specs, &[]).unwrap();
    assert!(writer.write("b", &[0]).unwrap_err().to_string().contains("tensor \"b\": was not announced"));
    assert!(
        writer.write("a", &[0; 9]).unwrap_err().to_string().contains("tensor \"a\": 9 bytes, 8 are left")
    );
    writer.write("a", &[0; 5]).unwrap();
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("tensor \"a\": 3 bytes were never written"), "{message}");
    drop(SafetensorsWriter::create(&path, &specs, &[]).unwrap());
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn a_header_that_cannot_be_is_not_written() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.safetensors");
    let a = spec("a", Dtype::F32, &[2]);
    for (specs, wanted) in [
        (vec![a.clone(), a], "tensor \"a\": is announced twice"),
        (vec![spec("b", Dtype::F32, &[usize::MAX, 2])], "tensor \"b\": shape"),
        (vec![spec("c", Dtype::F4, &[1])], "tensor \"c\": shape"),
        (vec![spec("__metadata__", Dtype::F32, &[1])], "reserved"),
    ] {
        let message = SafetensorsWriter::create(&path, &specs, &[]).unwrap_err().to_string();
        assert!(message.contains(wanted), "{message}");
    }
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}
