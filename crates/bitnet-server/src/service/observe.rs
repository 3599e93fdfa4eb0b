//! Filter hits as metrics and log lines: the rule's id, never the text.

use crate::{
    config::FilterAction,
    filter::RuleHit,
    metrics::{FilterActionLabel, FilterDirection, Metrics},
};

/// A rule matched.
pub(super) fn rule_hit(metrics: &Metrics, direction: FilterDirection, hit: &RuleHit) {
    let action = match hit.action {
        FilterAction::Flag => FilterActionLabel::Flag,
        FilterAction::Mask => FilterActionLabel::Mask,
        FilterAction::Block => FilterActionLabel::Block,
    };
    metrics.record_filter_match(direction, &hit.rule_id, action);
    tracing::warn!(
        rule = &*hit.rule_id,
        category = &*hit.category,
        severity = ?hit.severity,
        direction = direction.as_str(),
        action = action.as_str(),
        "content filter rule matched"
    );
}
