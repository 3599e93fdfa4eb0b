//! A day of one-minute snapshots for `/stats/history`: a few running totals and gauges each, in a ring.

use std::{collections::VecDeque, sync::Mutex, sync::PoisonError};

use serde::Serialize;

/// One day of minutes.
const MAX_POINTS: usize = 1440;

/// One minute's figures. Counters are totals since the start: readers subtract two points.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct HistoryPoint {
    pub(super) unix_seconds: u64,
    pub(super) requests_running: i64,
    pub(super) requests_waiting: i64,
    pub(super) requests_finished_total: u64,
    pub(super) requests_rejected_total: u64,
    pub(super) prompt_tokens_total: u64,
    pub(super) generation_tokens_total: u64,
    pub(super) engine_busy_seconds_total: f64,
    pub(super) time_to_first_token_seconds_sum: f64,
    pub(super) time_to_first_token_seconds_count: u64,
    pub(super) kv_cache_usage_ratio: f64,
    pub(super) process_anonymous_memory_bytes: i64,
}

/// The ring. Locked once a minute and for each reader, never by a request's path.
#[derive(Debug, Default)]
pub(super) struct History {
    points: Mutex<VecDeque<HistoryPoint>>,
}

impl History {
    /// Adds a point; the oldest goes when a day is full.
    pub(super) fn push(&self, point: HistoryPoint) {
        let mut points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        if points.len() == MAX_POINTS {
            points.pop_front();
        }
        points.push_back(point);
    }

    /// The points after `unix_seconds`, oldest first.
    pub(super) fn since(&self, unix_seconds: u64) -> Vec<HistoryPoint> {
        let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        points.iter().filter(|point| point.unix_seconds > unix_seconds).cloned().collect()
    }
}
