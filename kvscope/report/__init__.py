"""The report: plain data from opened replays and traces, drawn into one offline HTML page, or into single figures."""
