//! The engine without a model: a seeded simulation of the whole loop, the scheduler alone, and the handle from the async side.

mod handle;
mod scheduling;
mod simulation;

use bitnet_core::model::PooledStates;

use super::{
    EngineError, FinishReason, GenerationRequest, SequenceEvent, TokenEvent,
    testing::{POISON, hashed_token, hidden_state, score},
};
use crate::config::ClientId;

/// Everything one choice has to say if it is left alone.
fn expected(request: &GenerationRequest, choice: u32, max_model_len: usize) -> Vec<SequenceEvent> {
    let mut tokens = request.prompt.clone();
    let scored = (1..tokens.len()).map(|position| Some(score(&tokens[..=position])));
    let logprobs = request.prompt_logprobs.map(|_| std::iter::once(None).chain(scored).collect());
    if request.prompt.contains(&POISON) {
        return vec![SequenceEvent::Failed(EngineError::NotFinite)];
    }
    let embedding = request.pooling.and_then(|pooling| {
        let mut pooled = PooledStates::new(pooling);
        (0..tokens.len()).for_each(|position| pooled.add(position, &hidden_state(&tokens[..=position])));
        pooled.embedding()
    });
    let mut events = vec![SequenceEvent::PromptDone { cached_tokens: 0, logprobs, embedding }];
    for _ in 0..request.max_tokens {
        let token = hashed_token(&tokens, &request.sampling, choice);
        tokens.push(token);
        events.push(SequenceEvent::Token(TokenEvent { token, logprobs: None }));
        if request.stop_tokens.contains(&token) {
            events.push(SequenceEvent::Finished(FinishReason::Stop));
            return events;
        }
        if tokens.len() == max_model_len {
            break;
        }
    }
    events.push(SequenceEvent::Finished(FinishReason::Length));
    events
}

fn client(number: u8) -> ClientId {
    ClientId::from_address([10, 0, 0, number].into())
}
