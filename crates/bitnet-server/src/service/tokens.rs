//! `/tokenize`, `/detokenize` and `/apply-template`: the prompt's way without a generation at its end.

use bitnet_core::TokenId;

use super::{Service, ServiceError, prompting::template_message};
use crate::{
    openai::{
        ApplyTemplateRequest, DetokenizeRequest, DetokenizeResponse, Message, TemplateResponse, TokenizeInput,
        TokenizeRequest, TokenizeResponse,
    },
    prompt::{ChatMessage, ChatOptions},
};

impl Service {
    /// `/tokenize`.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn tokenize(&self, request: TokenizeRequest) -> Result<TokenizeResponse, ServiceError> {
        self.card.names.resolve(request.model.as_deref())?;
        let tokens = match request.input {
            TokenizeInput::Text { text, add_special_tokens } => {
                self.with_prompter(move |prompter| prompter.encode_text(&text, add_special_tokens), "prompt").await?
            }
            TokenizeInput::Messages { messages, add_generation_prompt } => {
                let messages = template_messages(messages)?;
                let options = ChatOptions { add_generation_prompt, ..ChatOptions::default() };
                self.with_prompter(move |prompter| prompter.encode_chat(&messages, &options), "messages").await?
            }
        };
        Ok(TokenizeResponse {
            count: tokens.len(),
            tokens: tokens.into_iter().map(|id| id.0).collect(),
            max_model_len: self.card.max_model_len,
        })
    }

    /// `/detokenize`.
    ///
    /// # Errors
    /// [`ServiceError::Invalid`] when an id is outside the vocabulary.
    pub fn detokenize(&self, request: DetokenizeRequest) -> Result<DetokenizeResponse, ServiceError> {
        self.card.names.resolve(request.model.as_deref())?;
        let vocab_size = self.card.vocab_size;
        if let Some(id) = request.tokens.iter().find(|id| **id as usize >= vocab_size) {
            let message = format!("Token id {id} is outside the vocabulary of {vocab_size} ids.");
            return Err(ServiceError::invalid("tokens", message));
        }
        let ids: Vec<_> = request.tokens.into_iter().map(TokenId).collect();
        let prompt = self.tokenizer().decode(&ids, false);
        Ok(DetokenizeResponse { content: prompt.clone(), prompt })
    }

    /// `/apply-template`.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn apply_template(&self, request: ApplyTemplateRequest) -> Result<TemplateResponse, ServiceError> {
        self.card.names.resolve(request.model.as_deref())?;
        let messages = template_messages(request.messages)?;
        let options = ChatOptions { add_generation_prompt: request.add_generation_prompt, ..ChatOptions::default() };
        let render = self.with_prompter(move |prompter| prompter.render_chat(&messages, &options), "messages");
        Ok(TemplateResponse { prompt: render.await? })
    }
}

fn template_messages(messages: Vec<Message>) -> Result<Vec<ChatMessage>, ServiceError> {
    if messages.is_empty() {
        return Err(ServiceError::invalid("messages", "'messages' must hold at least one message."));
    }
    messages.into_iter().enumerate().map(|(index, message)| template_message(index, message)).collect()
}
