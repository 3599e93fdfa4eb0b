//! The sampler: one row of raw logits -> one token, or log-probabilities. Pure but for its scratch.
//!
//! Order: logits processors; temperature; top_k; min_p; top_p; then the largest `logit / temperature + noise` of what is
//! left. Each filter cuts the row after a last candidate, so top_p sees the probabilities renormalised over what top_k and
//! min_p kept.

use super::{
    NotFinite, SampleKey, SamplingParams, TokenLogprobs,
    candidates::{NoisyCandidates, Reach, Rest, Split},
    mask::TokenMask,
    noise::{Noise, gumbel},
    processors::LogitsProcessors,
    row::{Candidate, CutAfter, FiniteMax, NoisyArgmax, Scale, SumExp, first_of, select_best, sum_exp_by_id},
};
use crate::{
    ids::TokenId,
    kernels::{
        Isa,
        math::{exp, ln},
        screen::Selection,
    },
};

/// Picks tokens; owns scratch so that nothing is allocated a token.
#[derive(Debug)]
pub struct Sampler {
    isa: Isa,
    processors: LogitsProcessors,
    /// The row being worked on. `[vocab_size]`
    row: Vec<f32>,
    candidates: Vec<Candidate>,
    selection: Selection,
    reaches: Vec<Reach>,
    /// What [`Sampler::candidates`] found.
    ids: Vec<u32>,
    /// What it left out, where that counts.
    rest: Rest,
    /// A row's `f32` sum of exponentials is at least this part of what [`Rest`] and the candidates bound it by: each lane takes a
    /// 16th of the row, and loses at most 2^-24 with each, as may the bound; the rest is for the exponentials' own errors.
    least_of_sum: f64,
}

impl Sampler {
    /// Scratch for `vocab_size` logits.
    pub fn new(vocab_size: usize) -> Self {
        Self::with_isa(vocab_size, Isa::available().pop().unwrap_or(Isa::BASELINE))
    }

    /// As [`Sampler::new`], in a chosen instruction set; the tokens are the same.
    pub fn with_isa(vocab_size: usize, isa: Isa) -> Self {
        let processors = LogitsProcessors::new(vocab_size);
        Self {
            isa,
            processors,
            row: Vec::with_capacity(vocab_size),
            candidates: Vec::new(),
            selection: Selection::default(),
            reaches: Vec::new(),
            ids: Vec::new(),
            rest: Rest::default(),
            least_of_sum: 1.0 - 1e-4 - 1e-8 * vocab_size as f64,
        }
    }

    /// The next token given raw `logits` `[vocab_size]`. `prompt` and `generated` feed the penalties; `banned` ids (stop
    /// tokens before `min_tokens`) are never drawn. Deterministic in its arguments.
    ///
    /// # Errors
    /// [`NotFinite`] when a logit is NaN or +infinity, or every token is excluded.
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        prompt: &[TokenId],
        generated: &[TokenId],
        banned: &[TokenId],
        key: SampleKey,
    ) -> Result<TokenId, NotFinite> {
        self.isa.run(FiniteMax(logits))?;
        self.row.clear();
        self.row.extend_from_slice(logits);
        self.processors.apply(&mut self.row, params, prompt, generated, banned);
        if !params.is_greedy() {
            self.isa.run(Scale { row: &mut self.row, temperature: params.temperature });
        }
        let max = self.isa.run(FiniteMax(&self.row))?;
        let start = first_of(&self.row, max);
        if params.is_greedy() {
            return Ok(TokenId(start));
        }
        self.keep_top_k(params.top_k as usize);
        self.keep_min_p(params.min_p, max);
        if params.top_p < 1.0 {
            let total = self.isa.run(SumExp { row: &self.row, max });
            self.keep_top_p(params.top_p, max, total);
        }
        let noise = Noise::new(params.seed, key);
        Ok(TokenId(self.isa.run(NoisyArgmax { row: &self.row, start, noise })))
    }

    /// The ids, ascending, that most likely decide the next token when every logit lies within its radius of its estimate; what
    /// is not finite is never left out. Only `allowed` ids may come, if given. For [`Sampler::sample_among`]; `None` when the
    /// few that it wants would be too many.
    ///
    /// # Panics
    /// When the token depends on more ([`SamplingParams::needs_whole_row`]).
    pub fn candidates(
        &mut self,
        estimates: &[f32],
        radii: &[f32],
        allowed: Option<&TokenMask>,
        params: &SamplingParams,
        key: SampleKey,
    ) -> Option<&[u32]> {
        assert!(!params.needs_whole_row(), "a choice that no few logits decide");
        let Self { isa, row, selection, reaches, ids, rest, .. } = self;
        let estimates = match allowed {
            Some(allowed) => {
                allowed.apply(estimates, row);
                row
            }
            None => estimates,
        };
        ids.clear();
        if params.is_greedy() || params.top_k > 0 {
            let best = if params.is_greedy() { 1 } else { params.top_k as usize };
            ids.extend_from_slice(selection.candidates(estimates, radii, best, *isa));
        } else {
            let (temperature, noise) = (params.temperature, Noise::new(params.seed, key));
            isa.run(NoisyCandidates { estimates, radii, temperature, noise, found: reaches });
            if params.top_p < 1.0 || params.min_p > 0.0 {
                // Whatever may rank before the one of them that is drawn.
                let lower = |reach: &Reach| estimates[reach.id as usize] - radii[reach.id as usize];
                let least = reaches.iter().map(lower).fold(f32::INFINITY, f32::min);
                *rest = isa.run(Split { estimates, radii, least, temperature, above: ids })?;
            } else {
                ids.extend(reaches.iter().map(|reach| reach.id));
            }
        }
        // What an infinite radius kept.
        ids.retain(|&id| allowed.is_none_or(|allowed| allowed.contains(TokenId(id))));
        Some(ids)
    }

    /// The token [`Sampler::sample`] would choose of the whole row (where all that is not allowed is excluded), given the
    /// `logits` of the ids that [`Sampler::candidates`] has just found for the same parameters and key. `None`: it depends on
    /// the others, too.
    ///
    /// # Errors
    /// [`NotFinite`] when a logit is NaN or +infinity, or there are none.
    ///
    /// # Panics
    /// When there are not as many logits as ids.
    pub fn sample_among(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        key: SampleKey,
    ) -> Result<Option<TokenId>, NotFinite> {
        assert_eq!(logits.len(), self.ids.len(), "a logit for each candidate");
        self.isa.run(FiniteMax(logits))?;
        // Places among the candidates stand in for ids: they have the same order, so ties fall alike.
        self.row.clear();
        self.row.extend_from_slice(logits);
        if !params.is_greedy() {
            self.isa.run(Scale { row: &mut self.row, temperature: params.temperature });
        }
        let max = self.isa.run(FiniteMax(&self.row))?;
        let first = first_of(&self.row, max);
        if params.is_greedy() {
            return Ok(Some(TokenId(self.ids[first as usize])));
        }
        let noise = Noise::new(params.seed, key);
        if params.top_k > 0 {
            self.keep_top_k(params.top_k as usize);
            self.keep_min_p(params.min_p, max);
            if params.top_p < 1.0 {
                let total = sum_exp_by_id(&self.row, &self.ids, max);
                self.keep_top_p(params.top_p, max, total);
            }
        }
        let scores =
            (0..).zip(&self.row).zip(&self.ids).map(|((place, value), &id)| (value + gumbel(noise.bits(id)), place));
        let best = scores.reduce(|best: (f32, usize), next| if next.0 > best.0 { next } else { best });
        let (_, drawn) = best.expect("a maximum was found");
        let is_kept = params.top_k > 0 || self.is_surely_kept(drawn, params, max);
        Ok(is_kept.then(|| TokenId(self.ids[drawn])))
    }

    /// Whether neither min_p nor top_p cuts the candidate at `place`, whatever the logits of those that are none: they rank
    /// after it, and add at least [`Rest`] to the sum, or nothing where min_p may have cut them all.
    fn is_surely_kept(&mut self, place: usize, params: &SamplingParams, max: f32) -> bool {
        let drawn = Candidate { score: self.row[place], id: self.ids[place] };
        self.keep_min_p(params.min_p, max);
        if self.row[place] == f32::NEG_INFINITY {
            return false;
        }
        if params.top_p >= 1.0 {
            return true;
        }
        let rest = if params.min_p > 0.0 { 0.0 } else { self.rest.relative_to(max) };
        let candidates = self.row.iter().zip(&self.ids).map(|(&score, &id)| Candidate { score, id });
        self.candidates.clear();
        self.candidates.extend(candidates.filter(|candidate| candidate.rank(&drawn).is_lt()));
        self.candidates.sort_unstable_by(Candidate::rank);
        let before = self.candidates.iter().fold(0.0, |sum, candidate| sum + f64::from(exp(candidate.score - max)));
        let listed: f64 = self.row.iter().map(|score| f64::from(exp(score - max))).sum();
        before < f64::from(params.top_p) * (listed + rest) * self.least_of_sum
    }

    /// Log-softmax of the raw logits at `chosen`, and the `top` best (logit descending, id ascending).
    ///
    /// # Errors
    /// [`NotFinite`] when a logit is NaN or +infinity.
    ///
    /// # Panics
    /// When `chosen` is outside the row.
    pub fn logprobs(&mut self, logits: &[f32], chosen: TokenId, top: usize) -> Result<TokenLogprobs, NotFinite> {
        let max = self.isa.run(FiniteMax(logits))?;
        let ln_total = ln(self.isa.run(SumExp { row: logits, max }));
        let logprob = |logit: f32| (logit - max) - ln_total;
        select_best(logits, top, &mut self.candidates);
        let top = self.candidates.iter().map(|best| (TokenId(best.id), logprob(best.score))).collect();
        Ok(TokenLogprobs { logprob: logprob(logits[chosen.index()]), top })
    }

    fn keep_top_k(&mut self, top_k: usize) {
        if top_k == 0 || top_k >= self.row.len() {
            return;
        }
        select_best(&self.row, top_k, &mut self.candidates);
        self.cut_after_last_candidate();
    }

    /// Probability at least `min_p` times that of the best.
    fn keep_min_p(&mut self, min_p: f32, max: f32) {
        if min_p > 0.0 {
            let last = Candidate { score: max + ln(min_p), id: u32::MAX };
            self.isa.run(CutAfter { row: &mut self.row, last });
        }
    }

    /// The fewest candidates whose probabilities reach `top_p` of the row's `total`.
    fn keep_top_p(&mut self, top_p: f32, max: f32, total: f32) {
        let wanted = f64::from(top_p) * f64::from(total);
        // A nucleus is small as a rule: look at a few candidates, and at eight times as many when they were too few.
        let mut count = FIRST_CANDIDATES;
        loop {
            select_best(&self.row, count, &mut self.candidates);
            let mut sum = 0.0;
            let reached = self.candidates.iter().position(|candidate| {
                sum += f64::from(exp(candidate.score - max));
                sum >= wanted
            });
            if let Some(last) = reached {
                self.candidates.truncate(last + 1);
                break;
            }
            if self.candidates.len() < count {
                break; // rounding: all that is left belongs to the nucleus
            }
            count *= 8;
        }
        self.cut_after_last_candidate();
    }

    fn cut_after_last_candidate(&mut self) {
        if let Some(&last) = self.candidates.last() {
            self.isa.run(CutAfter { row: &mut self.row, last });
        }
    }
}

const FIRST_CANDIDATES: usize = 64;
