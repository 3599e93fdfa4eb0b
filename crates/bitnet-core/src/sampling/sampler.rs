//! The sampler: one row of raw logits -> one token, or log-probabilities. Pure but for its scratch.
//!
//! Order: logits processors; temperature; top_k; min_p; top_p; then the largest `logit / temperature + noise` of what is
//! left. Each filter cuts the row after a last candidate, so top_p sees the probabilities renormalised over what top_k and
//! min_p kept.

use super::{
    NotFinite, SampleKey, SamplingParams, TokenLogprobs,
    candidates::{NoisyCandidates, Reach, Rest, SumBelow},
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
        screen::{Screened, Selection, is_below, maxima_of},
    },
};

/// Sets `logits[i]` to the exact logit of `ids[i]`.
pub type Score<'a> = dyn FnMut(&[u32], &mut [f32]) + 'a;

/// Picks tokens; owns scratch so that nothing is allocated a token.
#[derive(Debug)]
pub struct Sampler {
    isa: Isa,
    processors: LogitsProcessors,
    /// The row being worked on. `[vocab_size]`
    row: Vec<f32>,
    candidates: Vec<Candidate>,
    /// For a choice by few logits: estimates after a mask and their maxima, ids that may matter, and those scored, ascending.
    masked: Vec<f32>,
    maxima: Vec<f32>,
    selection: Selection,
    reaches: Vec<Reach>,
    ids: Vec<u32>,
    logits: Vec<f32>,
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
            masked: Vec::new(),
            maxima: Vec::new(),
            selection: Selection::default(),
            reaches: Vec::new(),
            ids: Vec::new(),
            logits: Vec::new(),
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

    /// The token that [`Sampler::sample`] would choose of the whole row, given what a screen says of it: `score` is asked for
    /// the exact logits that decide it. Only `allowed` ids may come, if given. `None`: too many would have to be asked for.
    ///
    /// # Errors
    /// [`NotFinite`] when an exact logit is NaN or +infinity, or no id is left.
    ///
    /// # Panics
    /// When the token depends on more ([`SamplingParams::needs_whole_row`]).
    pub fn sample_screened(
        &mut self,
        screened: Screened<'_>,
        allowed: Option<&TokenMask>,
        params: &SamplingParams,
        key: SampleKey,
        score: &mut Score<'_>,
    ) -> Result<Option<TokenId>, NotFinite> {
        assert!(!params.needs_whole_row(), "a choice that no few logits decide");
        let (mut masked, mut maxima) = (std::mem::take(&mut self.masked), std::mem::take(&mut self.maxima));
        let screened = match allowed {
            Some(allowed) => {
                allowed.apply(screened.estimates, &mut masked);
                maxima_of(&masked, &mut maxima, self.isa);
                Screened { estimates: &masked, maxima: &maxima, ..screened }
            }
            None => screened,
        };
        // An infinite radius lets what is excluded reach anywhere.
        let may_come = |id: u32| allowed.is_none_or(|allowed| allowed.contains(TokenId(id)));
        let drawn = if params.is_greedy() || params.top_k > 0 {
            self.score_best(&screened, may_come, params, score);
            self.sample_scored(params, key).map(Some)
        } else {
            self.sample_noisy(&screened, may_come, params, key, score)
        };
        (self.masked, self.maxima) = (masked, maxima);
        drawn
    }

    /// Scores those that can be among the largest: of top_k, or the only one. The most promising are scored again with the
    /// others, which keeps all in the order of their ids.
    fn score_best(
        &mut self,
        screened: &Screened<'_>,
        may_come: impl Fn(u32) -> bool,
        params: &SamplingParams,
        score: &mut Score<'_>,
    ) {
        let count = if params.is_greedy() { 1 } else { params.top_k as usize };
        self.ids.clear();
        self.ids.extend(self.selection.promising(screened, count).iter().filter(|id| may_come(**id)));
        self.score_ids(score);
        let least = self.logits.iter().copied().fold(f32::INFINITY, f32::min);
        let least = if self.ids.len() < count { f32::NEG_INFINITY } else { least };
        self.ids.clear();
        self.ids.extend(self.selection.reaching(screened, least).iter().filter(|id| may_come(**id)));
        self.score_ids(score);
    }

    /// As [`Self::score_best`], those of `reaches` whose noisy score can be the largest.
    fn score_noisy(&mut self, temperature: f32, noise: Noise, score: &mut Score<'_>) {
        self.ids.clear();
        if let Some(promising) = self.reaches.iter().max_by(|a, b| a.upper.total_cmp(&b.upper)) {
            let mut logit = [0.0];
            score(&[promising.id], &mut logit);
            let least = logit[0] / temperature + gumbel(noise.bits(promising.id));
            self.ids.extend(self.reaches.iter().filter(|reach| !is_below(reach.upper, least)).map(|reach| reach.id));
        }
        self.score_ids(score);
    }

    fn score_ids(&mut self, score: &mut Score<'_>) {
        self.logits.resize(self.ids.len(), 0.0);
        score(&self.ids, &mut self.logits);
    }

    /// As [`Sampler::sample_screened`], where all ids are in the draw, or those that min_p and top_p keep.
    fn sample_noisy(
        &mut self,
        screened: &Screened<'_>,
        may_come: impl Fn(u32) -> bool,
        params: &SamplingParams,
        key: SampleKey,
        score: &mut Score<'_>,
    ) -> Result<Option<TokenId>, NotFinite> {
        let (isa, temperature, noise) = (self.isa, params.temperature, Noise::new(params.seed, key));
        isa.run(NoisyCandidates { screened, temperature, noise, found: &mut self.reaches });
        self.reaches.retain(|reach| may_come(reach.id));
        self.score_noisy(temperature, noise, score);
        let drawn = self.sample_scored(params, key)?;
        if params.top_p >= 1.0 && params.min_p <= 0.0 {
            return Ok(Some(drawn));
        }
        // Whatever may rank before it.
        let place = self.ids.binary_search(&drawn.0).expect("one of those scored");
        let least = self.logits[place];
        let reaching = self.selection.reaching(screened, least);
        if reaching.len() > screened.estimates.len() / WHOLE_ROW_SHARE {
            return Ok(None);
        }
        self.ids.clear();
        self.ids.extend(reaching.iter().filter(|id| may_come(**id)));
        self.score_ids(score);
        let rest = isa.run(SumBelow { screened, least, temperature });
        Ok(self.is_surely_kept(drawn, rest, params)?.then_some(drawn))
    }

    /// The token [`Sampler::sample`] would choose of a row of which only `logits`, those of `ids`, are not excluded; min_p and
    /// top_p count where top_k does.
    fn sample_scored(&mut self, params: &SamplingParams, key: SampleKey) -> Result<TokenId, NotFinite> {
        // Places among the ids stand in for them: they have the same order, so ties fall alike.
        let max = self.scale_scored(params)?;
        if params.is_greedy() {
            return Ok(TokenId(self.ids[first_of(&self.row, max) as usize]));
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
        let scores = self.row.iter().zip(&self.ids).map(|(value, &id)| (value + gumbel(noise.bits(id)), id));
        let best = scores.reduce(|best: (f32, u32), next| if next.0 > best.0 { next } else { best });
        Ok(TokenId(best.expect("a maximum was found").1))
    }

    /// `row = logits / temperature`, and its largest value.
    fn scale_scored(&mut self, params: &SamplingParams) -> Result<f32, NotFinite> {
        let max = self.isa.run(FiniteMax(&self.logits))?;
        self.row.clear();
        self.row.extend_from_slice(&self.logits);
        if params.is_greedy() {
            return Ok(max);
        }
        self.isa.run(Scale { row: &mut self.row, temperature: params.temperature });
        self.isa.run(FiniteMax(&self.row))
    }

    /// Whether neither min_p nor top_p cuts `drawn`, one of `ids`, whatever the logits of those that are not: they rank after
    /// it, and add at least `rest` to the sum, or nothing where min_p may have cut them all.
    fn is_surely_kept(&mut self, drawn: TokenId, rest: Rest, params: &SamplingParams) -> Result<bool, NotFinite> {
        let max = self.scale_scored(params)?;
        let place = self.ids.binary_search(&drawn.0).expect("what reaches its own logit");
        let drawn = Candidate { score: self.row[place], id: drawn.0 };
        self.keep_min_p(params.min_p, max);
        if self.row[place] == f32::NEG_INFINITY {
            return Ok(false);
        }
        if params.top_p >= 1.0 {
            return Ok(true);
        }
        let rest = if params.min_p > 0.0 { 0.0 } else { rest.relative_to(max) };
        let candidates = self.row.iter().zip(&self.ids).map(|(&score, &id)| Candidate { score, id });
        self.candidates.clear();
        self.candidates.extend(candidates.filter(|candidate| candidate.rank(&drawn).is_lt()));
        self.candidates.sort_unstable_by(Candidate::rank);
        let before = self.candidates.iter().fold(0.0, |sum, candidate| sum + f64::from(exp(candidate.score - max)));
        let listed: f64 = self.row.iter().map(|score| f64::from(exp(score - max))).sum();
        Ok(before < f64::from(params.top_p) * (listed + rest) * self.least_of_sum)
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

/// Ids of which the exact logits cost what this part of a whole row costs are no few.
const WHOLE_ROW_SHARE: usize = 16;
