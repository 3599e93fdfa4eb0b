//! What is written is read back where it belongs, rounded as the type says.

use super::{element::f32_to_f16, *};
use crate::kernels::{Isa, WideningOp};

/// Fills no tile.
const HEAD_DIM: usize = 20;

fn cache(dtype: KvDtype) -> KvCache {
    let geometry = Geometry { num_layers: 2, num_kv_heads: 2, head_dim: HEAD_DIM, dtype };
    KvCache::with_geometry(geometry, 3).expect("small")
}

struct Decode<'a>(KvTile<'a>);

impl WideningOp for Decode<'_> {
    type Output = Vec<[[f32; RUN]; 1]>;

    fn call<W: Widen>(self, widen: W) -> Self::Output {
        let mut out = vec![[[0.0; RUN]]; HEAD_DIM.next_multiple_of(RUN)];
        self.0.decode(widen, &mut out, 0);
        out
    }
}

/// `[dimension][token]`
fn decoded_keys(cache: &KvCache, block: u32, layer: usize, head: usize) -> Vec<[f32; BLOCK_TOKENS]> {
    Isa::BASELINE.run_widening(Decode(cache.keys(BlockId(block), layer, head))).into_iter().flatten().collect()
}

/// `[dimension][token]` too.
fn decoded_values(cache: &KvCache, block: u32, layer: usize, head: usize) -> Vec<[f32; BLOCK_TOKENS]> {
    let tile = cache.values(BlockId(block), layer, head);
    let groups = (0..HEAD_DIM.div_ceil(RUN)).map(|index| Isa::BASELINE.run_widening(Decode(tile.dimensions(index))));
    let of_group = |group: Vec<[[f32; RUN]; 1]>| (0..RUN).map(move |d| std::array::from_fn(|token| group[token][0][d]));
    groups.flat_map(of_group).collect()
}

#[test]
fn a_position_is_read_back_where_it_was_written_and_nowhere_else() {
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
        let mut cache = cache(dtype);
        let k: Vec<f32> = (0..2 * HEAD_DIM).map(|i| 1.0 + i as f32).collect();
        let v: Vec<f32> = k.iter().map(|x| -x).collect();
        cache.shared().claim(BlockId(1)).write(1, 16 + 5, &k, &v);
        for (block, layer, head) in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1)] {
            let (keys, values) = (decoded_keys(&cache, block, layer, head), decoded_values(&cache, block, layer, head));
            for (decoded, written) in [(keys, &k), (values, &v)] {
                for (d, tokens) in decoded.iter().enumerate() {
                    for (token, value) in tokens.iter().enumerate() {
                        let is_cell = (block, layer, token) == (1, 1, 5) && d < HEAD_DIM;
                        let expected = if is_cell { written[head * HEAD_DIM + d] } else { 0.0 };
                        assert!((value - expected).abs() < 0.2, "{dtype:?} {value} {expected}");
                    }
                }
            }
        }
    }
}

#[test]
fn bytes_are_within_half_a_step_of_what_was_written_and_not_finite_where_that_was_not() {
    let mut cache = cache(KvDtype::Int8);
    let mut written = [0.0; HEAD_DIM];
    written[..6].copy_from_slice(&[127.0, -63.4, 0.5, -0.4, 1.5, -127.0]);
    written[HEAD_DIM - 1] = 99.3;
    let mut not_finite = [1.0; 2 * HEAD_DIM];
    (not_finite[1], not_finite[HEAD_DIM + 18]) = (f32::INFINITY, f32::NEG_INFINITY);
    let mut block = cache.shared().claim(BlockId(2));
    block.write(1, 3, &[written, written.map(|x| x * 1e-3)].concat(), &[written, [0.0; HEAD_DIM]].concat());
    block.write(1, 4, &[f32::NAN; 2 * HEAD_DIM], &not_finite);
    let rounded = written.map(f32::round_ties_even);
    let [values, zeros] = [0, 1].map(|head| decoded_values(&cache, 2, 1, head));
    let [keys, small] = [0, 1].map(|head| decoded_keys(&cache, 2, 1, head));
    for d in 0..HEAD_DIM {
        assert_eq!((values[d][3], keys[d][3], zeros[d][3]), (rounded[d], rounded[d], 0.0));
        assert!((small[d][3] - written[d] * 1e-3).abs() < 0.51e-3);
        assert!(values[d][4].is_nan() && zeros[d][4].is_nan() && keys[d][4].is_nan());
    }
}

#[test]
fn half_precision_rounds_on_write_and_keeps_what_is_not_finite() {
    let mut cache = cache(KvDtype::F16);
    let mut k = [1.0 + f32::EPSILON; 2 * HEAD_DIM];
    k[1..6].copy_from_slice(&[0.1, 65_520.0, -1e-9, f32::NAN, f32::NEG_INFINITY]);
    cache.shared().claim(BlockId(0)).write(0, 0, &k, &k);
    for read in [decoded_keys(&cache, 0, 0, 0), decoded_values(&cache, 0, 0, 0)] {
        let read: Vec<_> = read.iter().map(|tokens| tokens[0]).collect();
        assert_eq!(read[..4], [1.0, 0.099_975_586, f32::INFINITY, -0.0]);
        assert!(read[4].is_nan() && read[5] == f32::NEG_INFINITY && read[HEAD_DIM - 1] == 1.0);
    }
}

#[test]
fn half_precision_is_rounded_as_the_reference_does() {
    let halves = (0..=u16::MAX).map(half::f16::from_bits).filter(|half| half.is_finite());
    for exact in halves.map(f32::from) {
        let next = exact.to_bits() + 0x1000; // halfway to the next half, where this one is normal
        for bits in [exact.to_bits(), next, next - 1, next + 1, next ^ 0x8000_0000] {
            let x = f32::from_bits(bits);
            assert_eq!(f32_to_f16(x), half::f16::from_f32(x).to_bits(), "{x:e}");
        }
    }
    for x in [65_519.99, 65_520.0, 1e30, f32::MIN_POSITIVE, 2.98e-8, 2.99e-8, 5.97e-8, 6.1e-5, f32::INFINITY] {
        assert_eq!(f32_to_f16(x), half::f16::from_f32(x).to_bits(), "{x:e}");
    }
}

#[test]
fn a_copied_block_is_equal_and_independent() {
    let mut cache = cache(KvDtype::F16);
    let (ones, twos) = ([1.0; 2 * HEAD_DIM], [2.0; 2 * HEAD_DIM]);
    cache.shared().claim(BlockId(0)).write(1, 3, &ones, &ones);
    cache.copy_block(BlockId(0), BlockId(2));
    cache.shared().claim(BlockId(0)).write(1, 3, &twos, &twos);
    assert_eq!(decoded_keys(&cache, 2, 1, 1)[0][3], 1.0);
    assert_eq!(decoded_keys(&cache, 0, 1, 1)[0][3], 2.0);
}

#[test]
fn an_impossible_size_is_an_error() {
    let geometry = Geometry { num_layers: 2, num_kv_heads: 2, head_dim: HEAD_DIM, dtype: KvDtype::F16 };
    assert!(KvCache::with_geometry(geometry, usize::MAX / 2).is_err());
}
