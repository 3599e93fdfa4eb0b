//! What can be measured, and how it is written: `prefill:TOKENS`, `decode:BATCH[@CONTEXT]`.

use std::str::FromStr;

/// One row of the table.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Case {
    /// A prompt of so many tokens, to its first token.
    Prefill { tokens: usize },
    /// So many sequences side by side, each behind so many tokens.
    Decode { batch: usize, context: usize },
}

/// Tokens each sequence decodes in a round.
pub(super) const DECODED_TOKENS: usize = 16;

/// The largest number in a case.
const MAX: usize = 1 << 20;

/// The cases of a run that names none.
pub(super) fn all() -> Vec<Case> {
    let prefill = [128, 512, 2048].map(|tokens| Case::Prefill { tokens });
    let batches = [1, 2, 4, 8, 16, 32].map(|batch| Case::Decode { batch, context: 0 });
    let contexts = [1024, 4096].map(|context| Case::Decode { batch: 1, context });
    prefill.into_iter().chain(batches).chain(contexts).collect()
}

impl Case {
    pub(super) fn phase(&self) -> &'static str {
        match self {
            Self::Prefill { .. } => "prefill",
            Self::Decode { .. } => "decode",
        }
    }

    /// Tokens computed for each sequence.
    pub(super) fn tokens(&self) -> usize {
        match self {
            Self::Prefill { tokens } => *tokens,
            Self::Decode { .. } => DECODED_TOKENS,
        }
    }

    pub(super) fn batch(&self) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { batch, .. } => *batch,
        }
    }

    pub(super) fn context(&self) -> usize {
        match self {
            Self::Prefill { .. } => 0,
            Self::Decode { context, .. } => *context,
        }
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(written: &str) -> Result<Self, String> {
        let number = |text: &str, least: usize| text.parse().ok().filter(|number| (least..=MAX).contains(number));
        let case = match written.split_once(':') {
            Some(("prefill", tokens)) => number(tokens, 1).map(|tokens| Self::Prefill { tokens }),
            Some(("decode", rest)) => {
                let (batch, context) = rest.split_once('@').unwrap_or((rest, "0"));
                number(batch, 1).zip(number(context, 0)).map(|(batch, context)| Self::Decode { batch, context })
            }
            _ => None,
        };
        case.ok_or_else(|| format!("`{written}` is neither prefill:TOKENS nor decode:BATCH[@CONTEXT]"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_read_as_written_and_nothing_else_is() {
        assert_eq!("prefill:512".parse(), Ok(Case::Prefill { tokens: 512 }));
        assert_eq!("decode:8".parse(), Ok(Case::Decode { batch: 8, context: 0 }));
        assert_eq!("decode:1@4096".parse(), Ok(Case::Decode { batch: 1, context: 4096 }));
        for bad in
            ["", "prefill", "prefill:0", "prefill:1@2", "decode:0", "decode:1@", "decode:-1", "decode:9999999", "x:1"]
        {
            assert!(bad.parse::<Case>().is_err(), "{bad}");
        }
    }
}
