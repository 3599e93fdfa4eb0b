//! The progress of a long load or batch: a bar when stderr is a terminal, nothing otherwise (the log has its lines).

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over repacked weights. It appears only when loading takes noticeable time.
pub(crate) fn weights_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style =
        ProgressStyle::with_template("loading  {bar:40}  {percent:>3} %  {msg}").expect("the template is valid");
    bar.set_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A bar over the lines of a batch.
pub(crate) fn lines_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:40}  {pos} of {len} lines  {elapsed} gone, {eta} left")
        .expect("the template is valid");
    bar.set_style(style);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
