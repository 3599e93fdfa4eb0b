//! What is written is read back where it belongs, rounded as the type says.

use super::{element::f32_to_f16, *};

const HEAD_DIM: usize = 6;

fn cache(dtype: KvDtype) -> KvCache {
    let geometry = Geometry { num_layers: 2, num_kv_heads: 2, head_dim: HEAD_DIM, dtype };
    KvCache::with_geometry(geometry, 3).expect("small")
}

fn decoded(tile: KvTile<'_>) -> Vec<f32> {
    let mut out = vec![0.0; BLOCK_TOKENS * HEAD_DIM.next_multiple_of(16)];
    tile.decode(Isa::BASELINE, &mut out, 16);
    out
}

#[test]
fn a_position_is_read_back_where_it_was_written_and_nowhere_else() {
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
        let mut cache = cache(dtype);
        let k: Vec<f32> = (0..2 * HEAD_DIM).map(|i| 1.0 + i as f32).collect();
        let v: Vec<f32> = k.iter().map(|x| -x).collect();
        cache.shared().claim(BlockId(1)).write(1, 16 + 5, &k, &v);
        for (block, layer, head) in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1)] {
            let written = (block, layer) == (1, 1);
            let (keys, values) = (cache.keys(BlockId(block), layer, head), cache.values(BlockId(block), layer, head));
            for (i, key) in decoded(keys).into_iter().enumerate() {
                let is_cell = written && i % 16 == 5 && i / 16 < HEAD_DIM;
                assert!((key - if is_cell { k[head * HEAD_DIM + i / 16] } else { 0.0 }).abs() < 0.05, "{dtype:?}");
            }
            for (i, value) in decoded(values).into_iter().enumerate() {
                let is_cell = written && i / 16 == 5 && i % 16 < HEAD_DIM;
                assert!((value - if is_cell { v[head * HEAD_DIM + i % 16] } else { 0.0 }).abs() < 0.05, "{dtype:?}");
            }
        }
    }
}

#[test]
fn bytes_are_within_half_a_step_of_what_was_written_and_not_finite_where_that_was_not() {
    let mut cache = cache(KvDtype::Int8);
    let written = [127.0, -63.4, 0.5, -0.4, 1.5, -127.0];
    let mut block = cache.shared().claim(BlockId(2));
    block.write(1, 3, &[written, written.map(|x| x * 1e-3)].concat(), &[written, [0.0; HEAD_DIM]].concat());
    block.write(1, 4, &[f32::NAN; 2 * HEAD_DIM], &[1.0, f32::INFINITY, 1.0, 1.0, 1.0, 1.0].repeat(2));
    let rounded = [127.0, -63.0, 0.0, 0.0, 2.0, -127.0];
    let [values, zeros] = [0, 1].map(|head| decoded(cache.values(BlockId(2), 1, head)));
    assert_eq!(values[3 * 16..][..HEAD_DIM], rounded);
    assert_eq!(zeros[3 * 16..][..HEAD_DIM], [0.0; HEAD_DIM]);
    assert!(values[4 * 16..][..HEAD_DIM].iter().all(|value| value.is_nan()));
    let [keys, small] = [0, 1].map(|head| decoded(cache.keys(BlockId(2), 1, head)));
    for (d, rounded) in rounded.into_iter().enumerate() {
        assert_eq!(keys[d * 16 + 3], rounded);
        assert!((small[d * 16 + 3] - written[d] * 1e-3).abs() < 0.51e-3);
        assert!(keys[d * 16 + 4].is_nan());
    }
}

#[test]
fn half_precision_rounds_on_write_and_keeps_what_is_not_finite() {
    let mut cache = cache(KvDtype::F16);
    let k = [1.0 + f32::EPSILON, 0.1, 65_520.0, -1e-9, f32::NAN, f32::NEG_INFINITY];
    cache.shared().claim(BlockId(0)).write(0, 0, &k, &k);
    let read = &decoded(cache.values(BlockId(0), 0, 0))[..HEAD_DIM];
    assert_eq!(read[..4], [1.0, 0.099_975_586, f32::INFINITY, -0.0]);
    assert!(read[4].is_nan() && read[5] == f32::NEG_INFINITY);
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
    assert_eq!(decoded(cache.keys(BlockId(2), 1, 1))[3], 1.0);
    assert_eq!(decoded(cache.keys(BlockId(0), 1, 1))[3], 2.0);
}

#[test]
fn an_impossible_size_is_an_error() {
    let geometry = Geometry { num_layers: 2, num_kv_heads: 2, head_dim: HEAD_DIM, dtype: KvDtype::F16 };
    assert!(KvCache::with_geometry(geometry, usize::MAX / 2).is_err());
}
