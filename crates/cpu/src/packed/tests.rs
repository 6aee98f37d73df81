use ctxserve_backend::conformance::Random;
use ctxserve_backend::{Backend, Role};
use ctxserve_core::Nvfp4Run;

use super::*;
use crate::backend::{CpuBackend, CpuOptions};
use crate::isa::Isa;
use crate::linear::linear;
use crate::rows::Rows;

const ROWS: usize = 19;

fn bytes(random: &mut Random, count: usize) -> Vec<u8> {
    (0..count).map(|_| random.bits() as u8).collect()
}

/// E4M3 scales of every kind: of either sign, zero, subnormal, the largest.
fn nvfp4(random: &mut Random, cols: usize) -> Matrix {
    let scales = (0..ROWS * cols / 16).map(|at| [0x38, 0xb9, 0, 3, 0x7e, 0x81, 0x22][at % 7]).collect();
    let run = |rows, weight| Nvfp4Run { rows, weight, input: None };
    let runs = vec![run(5, 0.37), run(0, 9.0), run(13, -1.9e-3), run(1, 1.0)];
    let codes = bytes(random, ROWS * cols / 2);
    Matrix::new(ROWS, cols, Elements::Nvfp4 { codes, scales, runs }).unwrap()
}

fn affine(random: &mut Random, cols: usize, bits: usize, group: usize) -> Matrix {
    let codes = bytes(random, ROWS * cols * bits / 8);
    let scales = random.vector(ROWS * cols / group, 0.1);
    let offsets = random.vector(ROWS * cols / group, 1.0);
    Matrix::new(ROWS, cols, Elements::Affine { bits, group, codes, scales, offsets }).unwrap()
}

fn matrices(random: &mut Random) -> Vec<Matrix> {
    let mut matrices: Vec<_> = [16, 48, 544].into_iter().map(|cols| nvfp4(random, cols)).collect();
    for bits in [4, 8] {
        // Groups of whole blocks, also such as parts of a panel cut through, and others.
        for (cols, group) in [(64, 32), (192, 64), (768, 384), (288, 96), (48, 16), (24, 8)] {
            matrices.push(affine(random, cols, bits, group));
        }
    }
    matrices
}

#[test]
fn rows_are_read_as_they_are_defined() {
    for matrix in matrices(&mut Random::new(1)) {
        let packed = Packed::new(matrix.clone(), 1, false).unwrap();
        let (mut got, mut want) = (vec![0.0; matrix.cols()], vec![0.0; matrix.cols()]);
        for row in 0..ROWS {
            packed.read_row(row, &mut got);
            decode_row(&matrix, row, &mut want);
            assert_eq!(got, want, "row {row} of {:?} [{ROWS}, {}]", matrix.encoding(), matrix.cols());
        }
    }
}

#[test]
fn products_are_those_of_the_plain_loops() {
    let mut random = Random::new(2);
    for matrix in matrices(&mut random) {
        let (cols, encoding) = (matrix.cols(), matrix.encoding());
        let load = |backend: &mut CpuBackend| backend.load_matrix(matrix.clone(), None, Role::Down).unwrap();
        for count in [1, 3, 8, 13] {
            let x = Rows::from_vec(random.vector(count * cols, 1.0), cols);
            let want = linear("test", None, &load(&mut CpuBackend::plain()), &x).unwrap();
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
            for &isa in Isa::available() {
                let mut ours = CpuBackend::new(CpuOptions { isa: Some(isa), ..Default::default() }).unwrap();
                let matrix = load(&mut ours);
                let got = linear("test", ours.fast.as_ref(), &matrix, &x).unwrap();
                for row in 0..count {
                    let (got, want) = (got.row(row), want.row(row));
                    let error = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
                    let size = norm(&mut want.iter().copied());
                    assert!(error < 2e-6 * size, "{isa}, {encoding:?} of {cols}, {count} rows: {error}");
                }
            }
        }
    }
}
