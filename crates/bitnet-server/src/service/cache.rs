//! What the response cache holds and for whom: the engine's events of a deterministic request, replayed later through the
//! same stages as live ones, so that stop strings, filter and wire format cannot differ; and the stream of such a request,
//! read by all who asked the same meanwhile. A hit counts against the client's limits and in all counters of requests and
//! tokens like any answer; only the engine's turns cost it nothing, because it takes none.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use crate::{
    engine::{GenerationRequest, SequenceEvent, SequenceStream},
    limits::ClientId,
    metrics::Metrics,
    output::StopStrings,
    response_cache::{CacheKey, CacheKeyBuilder, ResponseCache, Weighted},
};

/// The events of each choice, up to the one that ended it.
#[derive(Debug)]
pub(super) struct CachedAnswer(Vec<Vec<SequenceEvent>>);

impl CachedAnswer {
    /// The events, choice by choice.
    pub(super) fn choices(&self) -> impl Iterator<Item = &[SequenceEvent]> {
        self.0.iter().map(Vec::as_slice)
    }
}

impl Weighted for CachedAnswer {
    fn weight_bytes(&self) -> usize {
        size_of::<Self>() + self.0.iter().flatten().map(event_bytes).sum::<usize>()
    }
}

fn event_bytes(event: &SequenceEvent) -> usize {
    const ALTERNATIVE_BYTES: usize = 8;
    let alternatives = match event {
        SequenceEvent::Token(token) => token.logprobs.as_ref().map_or(0, |logprobs| logprobs.top.len()),
        SequenceEvent::PromptDone { logprobs: Some(logprobs), .. } => {
            logprobs.iter().map(|entry| 8 + entry.as_ref().map_or(0, |logprobs| logprobs.top.len())).sum()
        }
        _ => 0,
    };
    size_of::<SequenceEvent>() + ALTERNATIVE_BYTES * alternatives
}

/// Collects the events of a request on its way and keeps them when it ends well.
#[derive(Debug)]
pub(super) struct Recorder {
    cache: Arc<ResponseCache<CachedAnswer>>,
    metrics: Arc<Metrics>,
    key: CacheKey,
    choices: Vec<Vec<SequenceEvent>>,
}

impl Recorder {
    pub(super) fn new(
        cache: Arc<ResponseCache<CachedAnswer>>,
        metrics: Arc<Metrics>,
        key: CacheKey,
        num_choices: usize,
    ) -> Self {
        Self { cache, metrics, key, choices: vec![Vec::new(); num_choices] }
    }

    pub(super) fn record(&mut self, choice: usize, event: &SequenceEvent) {
        self.choices[choice].push(event.clone());
    }

    pub(super) fn keep(self) {
        self.cache.insert(self.key, Arc::new(CachedAnswer(self.choices)), Instant::now());
        self.metrics.set_response_cache(self.cache.bytes(), self.cache.evictions());
    }
}

/// One choice of a running answer, for any number of readers. When the last of them is gone the sequence is cancelled.
#[derive(Debug)]
pub(super) struct SharedStream {
    /// What was said so far; never more than the request may get.
    said: Mutex<Vec<SequenceEvent>>,
    /// Whoever holds it brings the next event for all.
    stream: tokio::sync::Mutex<SequenceStream>,
}

impl SharedStream {
    pub(super) fn new(stream: SequenceStream) -> Arc<Self> {
        Arc::new(Self { said: Mutex::default(), stream: tokio::sync::Mutex::new(stream) })
    }

    /// Event number `index`; the earlier ones have been read. Cancel-safe.
    pub(super) async fn event(&self, index: usize) -> SequenceEvent {
        if let Some(event) = self.said(index) {
            return event;
        }
        let mut stream = self.stream.lock().await;
        if let Some(event) = self.said(index) {
            return event;
        }
        let event = stream.next().await;
        self.said.lock().unwrap_or_else(PoisonError::into_inner).push(event.clone());
        event
    }

    fn said(&self, index: usize) -> Option<SequenceEvent> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).get(index).cloned()
    }
}

/// The key of `requests`: everything that can change a token or where its choice ends, and the client, so that nobody
/// can learn by timing what others asked.
pub(super) fn cache_key(
    fingerprint: &str,
    client: &ClientId,
    requests: &[GenerationRequest],
    stop: &StopStrings,
) -> CacheKey {
    let mut key = CacheKeyBuilder::new("answers/1")
        .bytes("model", fingerprint.as_bytes())
        .bytes("client", client.as_bytes())
        .numbers("stop strings", [stop.as_slice().len() as u64]);
    for string in stop.as_slice() {
        key = key.bytes("stop", string.as_bytes());
    }
    for request in requests {
        let sampling = &request.sampling;
        let floats = [
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.frequency_penalty,
            sampling.presence_penalty,
            sampling.repetition_penalty,
        ];
        // A greedy answer does not depend on the seed, and one was drawn when none was given.
        let seed = if sampling.temperature == 0.0 { 0 } else { sampling.seed.cast_unsigned() };
        let optional = |value: Option<usize>| value.map_or(0, |value| value as u64 + 1);
        let integers = [
            seed,
            u64::from(sampling.top_k),
            u64::from(request.num_choices),
            request.max_tokens as u64,
            request.min_tokens as u64,
            optional(request.logprobs),
            optional(request.prompt_logprobs),
        ];
        key = key
            .numbers("prompt", request.prompt.iter().map(|id| u64::from(id.0)))
            .numbers("floats", floats.map(|value| u64::from(value.to_bits())))
            .numbers("integers", integers)
            .numbers(
                "bias",
                sampling.logit_bias.iter().flat_map(|(id, bias)| [u64::from(id.0), u64::from(bias.to_bits())]),
            )
            .numbers("stop tokens", request.stop_tokens.iter().map(|id| u64::from(id.0)))
            .bytes("constraint", request.constraint.as_ref().map_or(&[], |rule| rule.identity()));
    }
    key.finish()
}

#[cfg(test)]
mod tests {
    use bitnet_core::kv_cache::KvDtype;

    use super::*;
    use crate::{
        config::{PrefixSharing, Speculation},
        engine::{
            Engine, EngineConfig,
            testing::{FakeExecutor, metrics, request},
        },
    };

    #[tokio::test]
    async fn whoever_came_first_may_leave_and_everybody_reads_the_same() {
        let config = EngineConfig {
            max_num_seqs: 1,
            max_num_batched_tokens: 16,
            max_queue: 1,
            max_queue_tokens: usize::MAX,
            max_model_len: 64,
            num_kv_blocks: 4,
            kv_dtype: KvDtype::F16,
            prefix_sharing: PrefixSharing::Off,
            speculation: Speculation::Auto,
        };
        let (engine, _thread) = Engine::start_with(FakeExecutor::new(&config), &config, metrics()).unwrap();
        let mut streams = engine.reserve().unwrap().submit(request(&[1, 2], 20)).unwrap();
        let leader = SharedStream::new(streams.remove(0));
        let readers = [Arc::clone(&leader), Arc::clone(&leader)];
        let first = leader.event(0).await;
        assert!(matches!(first, SequenceEvent::PromptDone { .. }));
        drop(leader);
        let read = async |stream: &SharedStream| {
            let mut events = Vec::new();
            while !matches!(events.last(), Some(SequenceEvent::Finished(_))) {
                events.push(stream.event(events.len()).await);
            }
            events
        };
        let (one, other) = tokio::join!(read(&readers[0]), read(&readers[1]));
        assert_eq!((one.len(), &one[0]), (22, &first));
        assert_eq!(one, other);
    }
}
