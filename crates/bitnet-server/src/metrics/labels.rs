//! The fixed label values, as enums: a value that is not in a list here cannot be recorded.

/// Declares an enum whose variants are label values, with the list of all of them for initialising series to 0.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The label's text.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}

label! {
    /// Why a request was turned away before it reached the engine.
    RejectReason {
        /// The client's own limit.
        RateLimited = "rate_limited",
        /// As many requests wait as may.
        QueueFull = "queue_full",
        /// As many prompt tokens wait as may.
        QueueTokens = "queue_tokens",
        /// It could not have been answered in time.
        Deadline = "deadline",
        /// The server is loading or shutting down.
        Draining = "draining",
        /// No key or a wrong one.
        Unauthorized = "unauthorized",
        /// It could not be understood or asks for what is not allowed.
        InvalidInput = "invalid_input",
        /// The body is too large.
        TooLarge = "too_large",
        /// The content filter refused the prompt.
        ContentFiltered = "content_filtered",
    }
}

label! {
    /// How a request that reached the engine ended.
    FinishLabel {
        /// A stop token or stop string.
        Stop = "stop",
        /// `max_tokens` or the end of the context.
        Length = "length",
        /// The model called tools.
        ToolCalls = "tool_calls",
        /// The content filter ended the output.
        ContentFilter = "content_filter",
        /// The client went away.
        Cancelled = "cancelled",
        /// The time limit.
        Timeout = "timeout",
        /// An error of ours.
        Error = "error",
    }
}

label! {
    /// Why generation was stopped from outside.
    CancelCause {
        /// The client closed the connection.
        ClientDisconnect = "client_disconnect",
        /// The time limit.
        Timeout = "timeout",
        /// The drain time was over.
        Shutdown = "shutdown",
        /// The content filter.
        Filter = "filter",
        /// The client did not read.
        SlowReader = "slow_reader",
    }
}

label! {
    /// What an engine step computed.
    StepPhase {
        /// Prompts only.
        Prefill = "prefill",
        /// One token for each sequence.
        Decode = "decode",
        /// Both.
        Mixed = "mixed",
    }
}

label! {
    /// What the response cache had.
    CacheResult {
        /// The answer.
        Hit = "hit",
        /// Nothing.
        Miss = "miss",
        /// It was not asked: the request is not deterministic, or the cache is off.
        Bypass = "bypass",
    }
}

label! {
    /// Lines of the security log.
    SecurityEvent {
        /// No key or a wrong one.
        AuthFailure = "auth_failure",
        /// A client over its limit.
        RateLimited = "rate_limited",
        /// Input that could not be understood.
        InvalidInput = "invalid_input",
        /// A refused prompt.
        ContentFiltered = "content_filtered",
        /// Output ended by the filter.
        ResponseFiltered = "response_filtered",
        /// A body over the limit.
        BodyTooLarge = "body_too_large",
        /// A client that did not finish its headers in time.
        HeaderTimeout = "header_timeout",
        /// A `Host` that is not ours.
        BadHost = "bad_host",
        /// An `Origin` that may not call.
        BadOrigin = "bad_origin",
    }
}

label! {
    /// Which text the content filter read.
    FilterDirection {
        /// Prompts.
        Input = "input",
        /// Generated text.
        Output = "output",
    }
}

label! {
    /// What a filter rule did.
    FilterActionLabel {
        /// Stopped it.
        Block = "block",
        /// Replaced characters.
        Mask = "mask",
        /// Only counted.
        Flag = "flag",
    }
}

label! {
    /// What memory is used for.
    MemoryKind {
        /// Packed weights.
        Weights = "weights",
        /// The KV cache.
        KvCache = "kv_cache",
        /// Activations and working memory.
        Scratch = "scratch",
        /// The response cache.
        ResponseCache = "response_cache",
    }
}

label! {
    /// How a real generation for `/health/generate` went.
    HealthResult {
        /// Tokens came in time.
        Ok = "ok",
        /// Tokens came, late.
        Slow = "slow",
        /// No tokens.
        Failed = "failed",
    }
}
