//! The sampler against a naive double-precision reference, the distribution it draws from, and what must not change a draw.

use proptest::prelude::*;

use super::{
    NotFinite, SampleKey, Sampler, SamplingParams, TokenMask,
    noise::{Noise, gumbel},
    row::{Candidate, select_best},
};
use crate::{
    ids::TokenId,
    kernels::{
        Isa,
        packing::ROW_TILE,
        screen::{Screened, maxima_of},
    },
};

const KEY: SampleKey = SampleKey { choice: 0, position: 0 };

fn draw(logits: &[f32], params: &SamplingParams, key: SampleKey) -> Result<TokenId, NotFinite> {
    Sampler::new(logits.len()).sample(logits, params, &[], &[], &[], key)
}

fn draw_at(logits: &[f32], params: &SamplingParams, position: u32) -> u32 {
    draw(logits, params, SampleKey { choice: 0, position }).expect("finite").0
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

/// Ids that top_k, min_p and top_p keep, in f64 and with a full sort.
fn naive_kept(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let scaled: Vec<f32> = logits.iter().map(|logit| logit / params.temperature).collect();
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| scaled[b as usize].total_cmp(&scaled[a as usize]).then(a.cmp(&b)));
    let weight = |id: u32| (f64::from(scaled[id as usize]) - f64::from(scaled[ids[0] as usize])).exp();
    let mut kept = ids.clone();
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    kept.retain(|&id| weight(id) >= f64::from(params.min_p));
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    let mut sum = 0.0;
    let reached = kept.iter().position(|&id| {
        sum += weight(id);
        sum >= f64::from(params.top_p) * total
    });
    kept.truncate(reached.map_or(kept.len(), |last| last + 1));
    kept
}

/// The plain loop that the group-wise screen stands for.
fn naive_draw(kept: &[u32], logits: &[f32], params: &SamplingParams, key: SampleKey) -> u32 {
    let noise = Noise::new(params.seed, key);
    let score = |id: u32| logits[id as usize] / params.temperature + gumbel(noise.bits(id));
    let better = |&a: &u32, &b: &u32| score(a).total_cmp(&score(b)).then(b.cmp(&a));
    kept.iter().copied().max_by(better).expect("something is kept")
}

#[test]
fn greedy_takes_the_best_and_of_equals_the_lower_id() {
    let mut logits = vec![0.5; 100];
    for id in [97, 33, 64] {
        logits[id] = 2.0;
    }
    assert_eq!(draw(&logits, &greedy(), KEY), Ok(TokenId(33)));
    let top_p_0 = SamplingParams { top_p: 0.0, ..SamplingParams::default() };
    assert_eq!(draw(&logits, &top_p_0, KEY), Ok(TokenId(33)));
    let tiny = SamplingParams { temperature: 1e-40, ..SamplingParams::default() };
    assert_eq!(draw(&logits, &tiny, KEY), Ok(TokenId(33)));
}

#[test]
fn what_is_not_finite_fails_and_minus_infinity_is_only_never_drawn() {
    for len in [5, 40] {
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, len - 1] {
                let mut logits = vec![0.0; len];
                logits[at] = bad;
                assert_eq!(draw(&logits, &greedy(), KEY), Err(NotFinite));
                assert_eq!(Sampler::new(len).logprobs(&logits, TokenId(1), 2), Err(NotFinite));
            }
        }
        assert_eq!(draw(&vec![f32::NEG_INFINITY; len], &greedy(), KEY), Err(NotFinite));
        let mut logits = vec![f32::NEG_INFINITY; len];
        logits[3] = -7.0;
        assert!((0..100).all(|position| draw_at(&logits, &SamplingParams::default(), position) == 3));
    }
}

#[test]
fn bias_decides_and_banned_tokens_are_never_drawn() {
    let logits = [1.0, 5.0, 3.0, 2.0];
    let biased = |id, value| SamplingParams { logit_bias: vec![(TokenId(id), value)], ..SamplingParams::default() };
    assert!((0..200).all(|position| draw_at(&logits, &biased(0, 100.0), position) == 0));
    assert!((0..200).all(|position| draw_at(&logits, &biased(1, -100.0), position) != 1));
    let banned = Sampler::new(4).sample(&logits, &greedy(), &[], &[], &[TokenId(1)], KEY);
    assert_eq!(banned, Ok(TokenId(2)));
    let all = [0, 1, 2, 3].map(TokenId);
    assert_eq!(Sampler::new(4).sample(&logits, &greedy(), &[], &[], &all, KEY), Err(NotFinite));
}

#[test]
fn penalties_see_the_right_tokens() {
    let logits = [3.0, 2.9, 2.0];
    let mut sampler = Sampler::new(3);
    let prompt = [TokenId(0)];
    let frequency = SamplingParams { frequency_penalty: 0.2, ..greedy() };
    let mut next = |params: &SamplingParams, generated: &[u32]| {
        let generated: Vec<_> = generated.iter().copied().map(TokenId).collect();
        sampler.sample(&logits, params, &prompt, &generated, &[], KEY).expect("finite").0
    };
    assert_eq!(next(&frequency, &[]), 0, "the prompt is not generated");
    assert_eq!(next(&frequency, &[0]), 1);
    assert_eq!(next(&frequency, &[0, 1, 1]), 0);
    assert_eq!(next(&SamplingParams { repetition_penalty: 1.1, ..greedy() }, &[]), 1, "the prompt is seen");
}

#[test]
fn draws_follow_the_softmax() {
    // Chi-square with 9 degrees of freedom is above 27.9 once in a thousand; the seeds are fixed.
    let logits: Vec<f32> = (0..10).map(|id| (id as f32 * 0.7).sin() * 2.0).collect();
    for (seed, temperature) in [(1, 1.0), (2, 0.7), (-3, 2.0)] {
        let params = SamplingParams { temperature, seed, ..SamplingParams::default() };
        let weights: Vec<f64> = logits.iter().map(|logit| f64::from(logit / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut counts = [0_u32; 10];
        let mut sampler = Sampler::new(10);
        for draw in 0..20_000 {
            let key = SampleKey { choice: draw % 4, position: draw / 4 };
            counts[sampler.sample(&logits, &params, &[], &[], &[], key).expect("finite").index()] += 1;
        }
        let chi_square: f64 = weights
            .iter()
            .zip(counts)
            .map(|(weight, count)| {
                let expected = 20_000.0 * weight / total;
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        assert!(chi_square < 27.9, "{chi_square} at temperature {temperature}: {counts:?}");
    }
}

#[test]
fn a_wide_nucleus_is_found_without_a_limit_on_candidates() {
    let logits: Vec<f32> = (0..5000_u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 20) as f32 * 1e-4).collect();
    let params = SamplingParams { top_p: 0.9, ..SamplingParams::default() };
    let kept = naive_kept(&logits, &params);
    assert!(kept.len() > 4000);
    for position in 0..20 {
        let key = SampleKey { choice: 0, position };
        assert_eq!(draw_at(&logits, &params, position), naive_draw(&kept, &logits, &params, key));
    }
}

#[test]
fn logprobs_are_the_log_softmax_of_the_raw_logits() {
    let logits: Vec<f32> = (0..1000).map(|id| ((id * 37 % 101) as f32).sqrt()).collect();
    let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    let found = Sampler::new(1000).logprobs(&logits, TokenId(123), 3).expect("finite");
    let exact = |id: usize| f64::from(logits[id]) - total.ln();
    assert!((f64::from(found.logprob) - exact(123)).abs() < 1e-5);
    let best: Vec<u32> = found.top.iter().map(|(id, _)| id.0).collect();
    let expected: Vec<u32> = (0..1000).filter(|id| id * 37 % 101 == 100).take(3).collect();
    assert_eq!(best, expected, "equal logits come in the order of ids");
    assert!(found.top.iter().all(|&(id, logprob)| (f64::from(logprob) - exact(id.index())).abs() < 1e-5));
    let certain = [0.0, f32::NEG_INFINITY];
    let never = Sampler::new(2).logprobs(&certain, TokenId(1), 0).expect("finite");
    assert_eq!(never.logprob, f32::NEG_INFINITY);
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values make ties; -infinity may be anywhere but first.
    let value = prop_oneof![8 => (-40_i32..40).prop_map(|v| v as f32 * 0.25), 8 => -10.0_f32..10.0, 1 => Just(f32::NEG_INFINITY)];
    prop::collection::vec(value, 1..400).prop_map(|mut row| {
        row[0] = row[0].max(-5.0);
        row
    })
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let top_p = prop_oneof![Just(1.0), 0.01_f32..1.0];
    let min_p = prop_oneof![Just(0.0), 0.001_f32..1.0];
    (0.1_f32..2.0, top_p, 0_u32..60, min_p, any::<i64>()).prop_map(|(temperature, top_p, top_k, min_p, seed)| {
        SamplingParams { temperature, top_p, top_k, min_p, seed, ..SamplingParams::default() }
    })
}

proptest! {
    #[test]
    fn filters_and_draw_agree_with_the_reference(logits in logits(), params in params(), position in 0_u32..1000) {
        let key = SampleKey { choice: 2, position };
        let kept = naive_kept(&logits, &params);
        // A cut that rounding may move by one candidate cannot be compared: the reference must agree with its neighbours.
        let moved = |factor: f32| SamplingParams { top_p: params.top_p * factor, min_p: params.min_p * factor, ..params.clone() };
        let sharp = [0.99999, 1.00001].iter().all(|&factor| {
            params.top_p == 1.0 && params.min_p == 0.0 || naive_kept(&logits, &moved(factor)) == kept
        });
        prop_assume!(sharp);
        if !params.is_greedy() {
            let drawn = draw(&logits, &params, key).expect("finite").0;
            prop_assert!(kept.contains(&drawn));
            prop_assert_eq!(drawn, naive_draw(&kept, &logits, &params, key));
        }
    }

    #[test]
    fn a_draw_depends_on_its_arguments_alone(logits in logits(), params in params(), position: u32) {
        let key = SampleKey { choice: 0, position };
        let alone = draw(&logits, &params, key).expect("finite");
        for isa in Isa::available() {
            let mut used = Sampler::with_isa(logits.len(), isa);
            let other = SamplingParams { frequency_penalty: 1.0, repetition_penalty: 1.5, top_k: 3, ..params.clone() };
            let _ = used.sample(&logits, &other, &[TokenId(0)], &[TokenId(0)], &[], key);
            let with_logprobs = used.logprobs(&logits, alone, 20).expect("finite");
            prop_assert_eq!(used.sample(&logits, &params, &[], &[], &[], key), Ok(alone));
            let again = Sampler::with_isa(logits.len(), Isa::BASELINE).logprobs(&logits, alone, 20);
            prop_assert_eq!(again, Ok(with_logprobs));
        }
    }

    #[test]
    fn select_best_is_a_sort(logits in logits(), count in 0_usize..500) {
        let mut best = Vec::new();
        select_best(&logits, count, &mut best);
        let finite = (0_u32..).zip(&logits).filter(|(_, score)| **score > f32::NEG_INFINITY);
        let mut sorted: Vec<_> = finite.map(|(id, &score)| Candidate { score, id }).collect();
        sorted.sort_by(Candidate::rank);
        sorted.truncate(count);
        prop_assert_eq!(best, sorted);
    }
}

/// What a screen may say of a row.
struct Bounds {
    estimates: Vec<f32>,
    maxima: Vec<f32>,
    radii: Vec<f32>,
}

impl Bounds {
    /// Estimates that are off by up to `radius`.
    fn of(logits: &[f32], radius: f32, seed: u32) -> Self {
        let noise = Noise::new(i64::from(seed), KEY);
        let estimate = |(id, &logit): (u32, &f32)| {
            let shift = (noise.bits(id) >> 8) as f32 / (1 << 23) as f32 - 1.0;
            logit + radius * shift
        };
        let estimates: Vec<f32> = (0..).zip(logits).map(estimate).collect();
        let off = |(estimate, logit): (&f32, &f32)| (estimate - logit).abs().max(radius / 2.0).next_up();
        let tiles = estimates.chunks(ROW_TILE).zip(logits.chunks(ROW_TILE));
        let radii = tiles.map(|(estimates, logits)| estimates.iter().zip(logits).map(off).fold(0.0, f32::max));
        Self::new(radii.collect(), estimates)
    }

    fn new(radii: Vec<f32>, estimates: Vec<f32>) -> Self {
        let mut maxima = Vec::new();
        maxima_of(&estimates, &mut maxima, Isa::BASELINE);
        Self { estimates, maxima, radii }
    }

    fn screened(&self) -> Screened<'_> {
        Screened { estimates: &self.estimates, maxima: &self.maxima, radii: &self.radii }
    }
}

/// What the candidates decide, and what the whole row does. `None` of the candidates: they leave it to the whole row.
fn both_ways(
    isa: Isa,
    logits: &[f32],
    bounds: &Bounds,
    allowed: Option<&TokenMask>,
    params: &SamplingParams,
) -> (Option<Result<TokenId, NotFinite>>, Result<TokenId, NotFinite>) {
    let mut sampler = Sampler::with_isa(logits.len(), isa);
    let mut row = logits.to_vec();
    if let Some(allowed) = allowed {
        allowed.apply(logits, &mut row);
    }
    let whole = sampler.sample(&row, params, &[], &[], &[], KEY);
    let mut score =
        |ids: &[u32], out: &mut [f32]| ids.iter().zip(out).for_each(|(&id, out)| *out = logits[id as usize]);
    (sampler.sample_screened(bounds.screened(), allowed, params, KEY, &mut score).transpose(), whole)
}

proptest! {
    #[test]
    fn a_choice_among_candidates_is_that_of_the_whole_row(
        levels in prop::collection::vec(-30_i32..30, 1..700),
        spread in 0.01_f32..2.0,
        radius in 0.0_f32..3.0,
        seed: u32,
        temperature in prop_oneof![Just(0.0_f32), 0.05_f32..2.0],
        top_k in prop_oneof![Just(0), 1_u32..60],
        min_p in prop_oneof![Just(0.0), 0.0_f32..0.5],
        top_p in prop_oneof![Just(1.0), 0.0_f32..1.0],
        words in prop_oneof![Just(None), prop::collection::vec(any::<u32>(), 1..22).prop_map(Some)],
    ) {
        // Few levels: many ties.
        let logits: Vec<f32> = levels.iter().map(|&level| level as f32 * spread).collect();
        let params = SamplingParams { temperature, top_k, min_p, top_p, seed: i64::from(seed), ..SamplingParams::default() };
        let allowed = words.map(TokenMask::from_words).filter(|allowed| (0..logits.len()).any(|id| allowed.contains(TokenId(id as u32))));
        let bounds = Bounds::of(&logits, radius, seed);
        for isa in [Isa::BASELINE, Isa::available()[Isa::available().len() - 1]] {
            let (decided, whole) = both_ways(isa, &logits, &bounds, allowed.as_ref(), &params);
            prop_assert!(decided.is_none_or(|decided| decided == whole), "{decided:?} instead of {whole:?}");
            let is_exact = temperature == 0.0 || top_k > 0 || min_p == 0.0 && top_p == 1.0;
            prop_assert!(decided.is_some() || !is_exact);
        }
    }
}

#[test]
fn a_peaked_row_is_decided_without_the_whole_row() {
    const VOCAB: usize = 50_000;
    let noise = Noise::new(1, KEY);
    // The largest of 50,000 noises is about 11: what is left of the row after ten tokens has little of the mass.
    let logits: Vec<f32> =
        (0..VOCAB as u32).map(|id| gumbel(noise.bits(id)) + if id % 5000 == 77 { 14.0 } else { 0.0 }).collect();
    let bounds = Bounds::of(&logits, 0.2, 3);
    let mut num_decided = 0;
    for seed in 0..200 {
        for (top_p, min_p) in [(0.9, 0.0), (1.0, 0.1)] {
            let params = SamplingParams { top_p, min_p, seed, temperature: 0.8, ..SamplingParams::default() };
            let (decided, whole) = both_ways(Isa::available()[0], &logits, &bounds, None, &params);
            assert!(decided.is_none_or(|decided| decided == whole));
            num_decided += usize::from(decided.is_some());
        }
    }
    assert!((300..400).contains(&num_decided), "{num_decided} of 400");
}

#[test]
fn the_most_promising_logits_rule_most_others_out() {
    let noise = Noise::new(5, KEY);
    let logits: Vec<f32> = (0..50_000).map(|id| 0.5 * gumbel(noise.bits(id))).collect();
    // As in a screen of many columns, whose errors are far from all the same way.
    let bounds = Bounds::new(vec![2.0; logits.len().div_ceil(ROW_TILE)], Bounds::of(&logits, 0.2, 3).estimates);
    let mut sorted = bounds.estimates.clone();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    for (temperature, top_k) in [(0.0, 0), (0.0001, 0), (1.0, 5)] {
        let params = SamplingParams { temperature, top_k, ..SamplingParams::default() };
        // All that the bounds alone leave open.
        let lower = sorted[top_k.saturating_sub(1) as usize] - 2.0;
        let possible = sorted.iter().filter(|estimate| **estimate + 2.0 >= lower).count();
        let mut num_scored = 0;
        let mut score = |ids: &[u32], out: &mut [f32]| {
            num_scored += ids.len();
            ids.iter().zip(out).for_each(|(&id, out)| *out = logits[id as usize]);
        };
        let drawn = Sampler::new(logits.len()).sample_screened(bounds.screened(), None, &params, KEY, &mut score);
        assert_eq!(drawn.map(|drawn| drawn.expect("few decide it")), draw(&logits, &params, KEY));
        assert!(num_scored * 2 < possible, "{num_scored} of {possible}");
    }
}

#[test]
fn a_logit_that_is_not_finite_is_a_candidate() {
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let (mut estimates, mut radii) = (vec![5.0; 200], vec![0.1; 7]);
        (estimates[150], radii[150 / ROW_TILE]) = (0.0, f32::INFINITY);
        let bounds = Bounds::new(radii, estimates);
        let mut score = |ids: &[u32], out: &mut [f32]| {
            ids.iter().zip(out).for_each(|(&id, out)| *out = if id == 150 { f32::NAN } else { 5.0 });
        };
        let drawn = Sampler::new(200).sample_screened(bounds.screened(), None, &params, KEY, &mut score);
        assert_eq!(drawn, Err(NotFinite));
    }
}

#[test]
fn what_changes_single_logits_needs_the_whole_row() {
    let base = SamplingParams::default;
    let needs = |params: SamplingParams| params.needs_whole_row();
    assert!(!needs(base()) && !needs(greedy()) && !needs(SamplingParams { top_k: 40, min_p: 0.1, ..base() }));
    assert!(!needs(SamplingParams { top_p: 0.9, ..greedy() }));
    assert!(!needs(SamplingParams { top_p: 0.9, ..base() }) && !needs(SamplingParams { min_p: 0.1, ..base() }));
    assert!(needs(SamplingParams { repetition_penalty: 1.1, ..greedy() }));
    assert!(needs(SamplingParams { frequency_penalty: 0.1, ..greedy() }));
    assert!(needs(SamplingParams { presence_penalty: 0.1, ..greedy() }));
    assert!(needs(SamplingParams { logit_bias: vec![(TokenId(0), 1.0)], ..greedy() }));
}
