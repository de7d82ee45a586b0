"""Programs around training; importing `rsgrpo` first finds our packages, whatever lies in the current folder."""

import rsgrpo as rsgrpo
