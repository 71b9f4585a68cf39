//! The orthonormal Walsh-Hadamard rotation, in place.
//!
//! Owns the sizes that llama.cpp picks for a head (`build_input_k_rot` and `build_input_v_rot`).

/// The rotation of K in llama.cpp: the largest power of two that divides the head, if that is at least 64.
pub fn size_k(d: usize) -> Option<usize> {
    let size = 1 << d.trailing_zeros();
    (size >= 64).then_some(size)
}

/// The rotation of V in llama.cpp: always 64.
pub fn size_v(d: usize) -> Option<usize> {
    d.is_multiple_of(64).then_some(64)
}

/// Rotates each run of `size` elements (a power of two). Twice is the identity.
pub fn rotate(x: &mut [f32], size: usize) {
    let norm = 1.0 / (size as f32).sqrt();
    for run in x.chunks_exact_mut(size) {
        let mut half = 1;
        while half < size {
            for pair in run.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        run.iter_mut().for_each(|x| *x *= norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_orthonormal_and_twice_is_the_identity() {
        for size in [1, 2, 64, 128] {
            let rows: Vec<Vec<f32>> = (0..size)
                .map(|i| {
                    let mut x = vec![0.0; size];
                    x[i] = 1.0;
                    rotate(&mut x, size);
                    x
                })
                .collect();
            for (i, a) in rows.iter().enumerate() {
                for (j, b) in rows.iter().enumerate() {
                    let dot: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                    assert!((dot - f32::from(i == j)).abs() < 1e-5, "{size}: {i} {j} {dot}");
                }
                let mut back = a.clone();
                rotate(&mut back, size);
                assert!(back.iter().enumerate().all(|(j, x)| (x - f32::from(i == j)).abs() < 1e-5));
            }
        }
    }

    #[test]
    fn signs_are_those_of_ggml() {
        // ggml_gen_hadamard: H[2n] = [H, H; H, -H].
        let mut x = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut x, 4);
        assert_eq!(x, [5.0, -1.0, -2.0, 0.0]);
    }

    #[test]
    fn sizes_of_llama_cpp() {
        assert_eq!([64, 80, 96, 128, 192, 256].map(size_k), [Some(64), None, None, Some(128), Some(64), Some(256)]);
        assert_eq!([64, 80, 96, 128, 192, 256].map(size_v), [Some(64), None, None, Some(64), Some(64), Some(64)]);
    }
}
