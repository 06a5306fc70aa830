{{/* The name that all objects begin with: the release's, which says what it is. */}}
{{- define "posttrain.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "posttrain.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "posttrain.labels" -}}
{{ include "posttrain.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "posttrain.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* The settings file: what was given, and what follows from the release's name. */}}
{{- define "posttrain.settings" -}}
{{- $name := include "posttrain.fullname" . -}}
{{- $own := dict
  "progressServer" (dict "url" (printf "https://%s-progress.%s.svc:8443" $name .Release.Namespace))
  "operator" (dict "leaseName" (printf "%s-operator" $name))
-}}
{{- toYaml (mergeOverwrite $own (deepCopy .Values.settings)) -}}
{{- end -}}

{{- define "posttrain.leaseName" -}}
{{- (include "posttrain.settings" . | fromYaml).operator.leaseName -}}
{{- end -}}

{{/* The host that pods report to, which the certificate is for. */}}
{{- define "posttrain.progressHost" -}}
{{- $url := (include "posttrain.settings" . | fromYaml).progressServer.url -}}
{{- regexReplaceAll ":[0-9]+$" (urlParse $url).host "" -}}
{{- end -}}

{{- define "posttrain.certificateSecret" -}}
{{- .Values.certificate.secretName | default (printf "%s-progress-tls" (include "posttrain.fullname" .)) -}}
{{- end -}}
