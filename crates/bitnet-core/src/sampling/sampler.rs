//! The sampler: one row of raw logits -> one token, or log-probabilities. Pure but for its scratch.
//!
//! Order: logits processors; temperature; top_k; min_p; top_p; then the largest `logit / temperature + noise` of what is
//! left. Each filter cuts the row after a last candidate, so top_p sees the probabilities renormalised over what top_k and
//! min_p kept.

use super::{
    NotFinite, SampleKey, SamplingParams, TokenLogprobs,
    candidates::{NoisyCandidates, Reach},
    noise::{Noise, gumbel},
    processors::LogitsProcessors,
    row::{Candidate, CutAfter, FiniteMax, NoisyArgmax, Scale, SumExp, first_of, select_best},
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
        self.keep_top_p(params.top_p, max);
        let noise = Noise::new(params.seed, key);
        Ok(TokenId(self.isa.run(NoisyArgmax { row: &self.row, start, noise })))
    }

    /// The ids, ascending, that alone decide the next token when every logit lies within its radius of its estimate; what
    /// is not finite is never left out. For [`Sampler::sample_among`].
    ///
    /// # Panics
    /// When the token depends on more ([`SamplingParams::needs_whole_row`]).
    pub fn candidates(&mut self, estimates: &[f32], radii: &[f32], params: &SamplingParams, key: SampleKey) -> &[u32] {
        assert!(!params.needs_whole_row(), "a choice that no few logits decide");
        self.ids.clear();
        if params.is_greedy() || params.top_k > 0 {
            let best = if params.is_greedy() { 1 } else { params.top_k as usize };
            self.ids.extend_from_slice(self.selection.candidates(estimates, radii, best, self.isa));
        } else {
            let (temperature, noise) = (params.temperature, Noise::new(params.seed, key));
            self.isa.run(NoisyCandidates { estimates, radii, temperature, noise, found: &mut self.reaches });
            self.ids.extend(self.reaches.iter().map(|reach| reach.id));
        }
        &self.ids
    }

    /// The token [`Sampler::sample`] would choose of the whole row, given the `logits` of the ids that
    /// [`Sampler::candidates`] has just found for the same parameters and key.
    ///
    /// # Errors
    /// [`NotFinite`] when a logit is NaN or +infinity.
    ///
    /// # Panics
    /// When there are not as many logits as ids.
    pub fn sample_among(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        key: SampleKey,
    ) -> Result<TokenId, NotFinite> {
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
            return Ok(TokenId(self.ids[first as usize]));
        }
        self.keep_top_k(params.top_k as usize);
        self.keep_min_p(params.min_p, max);
        let noise = Noise::new(params.seed, key);
        let scores = self.row.iter().zip(&self.ids).map(|(&value, &id)| (value + gumbel(noise.bits(id)), id));
        let best = scores.reduce(|best, next| if next.0 > best.0 { next } else { best });
        Ok(TokenId(best.expect("a maximum was found").1))
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

    /// The fewest candidates whose probabilities reach `top_p`.
    fn keep_top_p(&mut self, top_p: f32, max: f32) {
        if top_p >= 1.0 {
            return;
        }
        let total = self.isa.run(SumExp { row: &self.row, max });
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
