//! A request's words -> token ids, with the content filter in between. Long work leaves the async threads.

use std::{sync::Arc, time::Instant};

use bitnet_core::{TokenId, tokenizer::EncodeOptions};
use serde_json::Value;

use super::{Service, ServiceError, observe};
use crate::{
    engine::GenerationRequest,
    filter::InputVerdict,
    metrics::{FilterDirection, SecurityEvent},
    openai::{Content, Message, Prompt, Role},
    prompt::{ChatMessage, ChatOptions, ChatPrompter, PromptError, TemplateError},
};

/// A prompt as the engine reads it and as `echo` shows it.
#[derive(Clone, Debug)]
pub(super) struct TextPrompt {
    pub(super) tokens: Vec<TokenId>,
    /// Without the BOS that the tokenizer's rule put in front.
    pub(super) text: String,
    /// Whether the first token is not part of `text`.
    pub(super) hidden_bos: bool,
}

impl Service {
    /// Runs `work` where it may take its time.
    pub(super) async fn with_prompter<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ChatPrompter) -> Result<T, PromptError> + Send + 'static,
        param: &'static str,
    ) -> Result<T, ServiceError> {
        let prompter = Arc::clone(&self.prompter);
        let result = tokio::task::spawn_blocking(move || work(&prompter)).await;
        let result = result.map_err(|error| ServiceError::Internal(format!("tokenizing ended early: {error}")))?;
        result.map_err(|error| prompt_error(error, param))
    }

    /// Messages as the template sees them, after the content filter.
    pub(super) fn screened_messages(&self, messages: Vec<Message>) -> Result<Vec<ChatMessage>, ServiceError> {
        messages
            .into_iter()
            .enumerate()
            .map(|(index, message)| {
                let mut message = template_message(index, message)?;
                message.content = self.screened("messages", message.content)?;
                Ok(message)
            })
            .collect()
    }

    /// Notes with `requests` what their output is expected to be. It only makes answers come sooner, so nothing that is
    /// written in it is read as a special token, and what reaches beyond any output is left out.
    pub(super) async fn predict(
        &self,
        requests: &mut [GenerationRequest],
        text: Option<String>,
    ) -> Result<(), ServiceError> {
        let Some(text) = text else { return Ok(()) };
        let options = EncodeOptions { add_special_tokens: false, parse_special: false };
        let encode = move |prompter: &ChatPrompter| Ok(prompter.tokenizer().encode(&text, options)?);
        let mut tokens = self.with_prompter(encode, "prediction").await?;
        tokens.truncate(self.card.max_model_len);
        let tokens: Arc<[TokenId]> = tokens.into();
        requests.iter_mut().for_each(|request| request.prediction = Arc::clone(&tokens));
        Ok(())
    }

    /// The prompts of a text request in field `param`, after the content filter.
    pub(super) async fn text_prompts(
        &self,
        param: &'static str,
        prompt: Prompt,
    ) -> Result<Vec<TextPrompt>, ServiceError> {
        let (tokenizer, context) = (Arc::clone(self.prompter.tokenizer()), self.card.max_model_len);
        match prompt {
            Prompt::Texts(texts) => {
                let texts = texts.into_iter().map(|text| self.screened(param, text)).collect::<Result<Vec<_>, _>>()?;
                let encode = move |prompter: &ChatPrompter| {
                    let encode = |text: String| {
                        let tokens = prompter.encode_text_within(&text, context)?;
                        let hidden_bos = tokens.first().is_some_and(|first| Some(*first) == tokenizer.bos());
                        Ok(TextPrompt { tokens, text, hidden_bos })
                    };
                    texts.into_iter().map(encode).collect()
                };
                self.with_prompter(encode, param).await
            }
            Prompt::Tokens(prompts) => prompts
                .into_iter()
                .map(|ids| {
                    if ids.len() > context {
                        let message = format!(
                            "'{param}' holds {} tokens, and this model's maximum context length is {context}. Please shorten it.",
                            ids.len()
                        );
                        return Err(ServiceError::ContextLength { param, message });
                    }
                    let tokens: Vec<_> = ids.into_iter().map(TokenId).collect();
                    let hidden_bos = tokens.first().is_some_and(|first| Some(*first) == tokenizer.bos());
                    let text = tokenizer.decode(&tokens[usize::from(hidden_bos)..], false);
                    // Token ids are taken as they are, so there is nothing to mask in them.
                    if self.screened(param, text.clone())? != text {
                        let message = "The content filter masks parts of this prompt: send it as text.";
                        return Err(ServiceError::invalid(param, message));
                    }
                    Ok(TextPrompt { tokens, text, hidden_bos })
                })
                .collect(),
        }
    }

    /// `text` as the content filter lets it pass.
    fn screened(&self, param: &'static str, text: String) -> Result<String, ServiceError> {
        let Some(filter) = &self.filter else { return Ok(text) };
        let start = Instant::now();
        let report = filter.check_input(&text);
        self.metrics.observe_filter(FilterDirection::Input, start.elapsed().as_secs_f64());
        for hit in &report.matches {
            observe::rule_hit(&self.metrics, FilterDirection::Input, hit);
        }
        match report.verdict {
            InputVerdict::Allow => Ok(text),
            InputVerdict::Mask(masked) => Ok(masked),
            InputVerdict::Block(hit) => {
                self.metrics.record_security(SecurityEvent::ContentFiltered);
                Err(ServiceError::ContentFiltered {
                    param,
                    rule: hit.rule_id.to_string(),
                    category: hit.category.to_string(),
                })
            }
        }
    }
}

/// The prompt of `messages` without the oldest of them, as few as it takes to fit into `room` tokens. Instructions and the last
/// message stay; when these do not fit either, the prompt is too long.
pub(super) fn encode_newest(
    prompter: &ChatPrompter,
    messages: &[ChatMessage],
    options: &ChatOptions,
    room: usize,
) -> Result<Vec<TokenId>, PromptError> {
    let encode = |num_dropped: usize| {
        let (oldest, rest) = messages.split_at(num_dropped);
        // A result without its call would say nothing.
        let orphans = rest.iter().take_while(|message| num_dropped > 0 && message.role == "tool").count();
        let instructions = oldest.iter().filter(|message| message.role == "system");
        let kept: Vec<_> = instructions.chain(&rest[orphans.min(rest.len().saturating_sub(1))..]).cloned().collect();
        prompter.encode_chat(&kept, options)
    };
    let mut prompt = encode(0)?;
    let (mut too_few, mut enough) = (0, messages.len().saturating_sub(1));
    if prompt.len() <= room || enough == 0 {
        return Ok(prompt);
    }
    prompt = encode(enough)?;
    while enough - too_few > 1 {
        let middle = usize::midpoint(too_few, enough);
        let shorter = encode(middle)?;
        if shorter.len() <= room {
            (enough, prompt) = (middle, shorter);
        } else {
            too_few = middle;
        }
    }
    Ok(prompt)
}

/// `message` in the words of chat templates.
pub(super) fn template_message(index: usize, message: Message) -> Result<ChatMessage, ServiceError> {
    let invalid = |what: &str| ServiceError::invalid("messages", format!("'messages[{index}]{what}"));
    let role = match message.role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool | Role::Function => "tool",
    };
    let content = match message.content {
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            let mut texts = Vec::with_capacity(parts.len());
            for part in parts {
                match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => texts.push(text),
                    ("text", None) => return Err(invalid("' has a text part without 'text'.")),
                    ("image_url" | "input_audio" | "file", _) => {
                        let message = format!("Content parts of type '{}' are not supported by this model.", part.kind);
                        return Err(ServiceError::Unsupported { param: "messages".to_owned(), message });
                    }
                    _ => return Err(invalid("' has a content part of unknown type.")),
                }
            }
            texts.join("\n")
        }
        None if message.role == Role::Assistant => String::new(),
        None => return Err(invalid(".content' is required for this role.")),
    };
    let tool_calls = match message.tool_calls {
        Some(calls) if !calls.is_empty() => {
            let calls = calls.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
            Some(Value::Array(calls.map_err(|error| ServiceError::Internal(error.to_string()))?))
        }
        _ => None,
    };
    Ok(ChatMessage {
        role: role.to_owned(),
        content,
        name: message.name,
        tool_calls,
        tool_call_id: message.tool_call_id,
    })
}

fn prompt_error(error: PromptError, param: &'static str) -> ServiceError {
    match error {
        PromptError::Template(
            error @ (TemplateError::Refused(_) | TemplateError::Limit(_) | TemplateError::Render(_)),
        ) => ServiceError::invalid(param, error.to_string()),
        error => ServiceError::Internal(error.to_string()),
    }
}
